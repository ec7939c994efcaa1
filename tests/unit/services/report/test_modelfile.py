"""A prompt that Ollama makes of a Modelfile is the one that the model was trained on."""

import re

import pytest

from sftcli.errors import DataError
from sftcli.services.report.modelfile import SHAPES, find_shape, modelfile

TURNS = (("system", "Be kind."), ("user", "a {{ b }}"), ("assistant", "c\n"), ("user", "d"))


def as_ollama_does(template: str, turns) -> str:
    """Fill in the three constructs of Go's text/template that are written."""
    loop = re.fullmatch(r"\{\{- range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.DOTALL)
    assert loop is not None
    body, rest = loop.groups()
    fields = {"{{ .Role }}": 0, "{{ .Content }}": 1}
    pieces = re.split(r"(\{\{ \.\w+ \}\})", body)
    return "".join(turn[fields[p]] if p in fields else p for turn in turns for p in pieces) + rest


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_template_makes_the_text_of_its_shape(shape):
    assert as_ollama_does(shape.template, TURNS) == shape.text(TURNS)
    assert find_shape(lambda turns: "<s>" + shape.text(turns), "<s>") == (shape, "")
    assert find_shape(shape.text, shape.before.partition("{}")[0]) == (
        shape,
        "",
    )  # which begins each turn too


def test_a_system_text_that_the_template_brings_is_kept():
    shape = SHAPES["ChatML"]

    def render(turns):
        return shape.text(turns if turns[0][0] == "system" else (("system", "I am Nut."), *turns))

    assert find_shape(render, "") == (shape, "I am Nut.")
    text = modelfile(
        "a.gguf", shape=shape, system="I am Nut.", stops=["<|im_end|>"], sampling={"temperature": 0.5}
    )
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n')
    assert text.endswith('SYSTEM """I am Nut."""\nPARAMETER temperature 0.5\nPARAMETER stop "<|im_end|>"\n')


def test_no_template_is_written_for_a_shape_that_is_not_known():
    shape = SHAPES["ChatML"]
    assert find_shape(lambda turns: shape.text(turns[:1]), "") is None  # forgets turns
    assert find_shape(lambda turns: shape.text(turns) + "<think>", "") is None
    assert "TEMPLATE" not in modelfile("a.gguf", shape=None, system="", stops=[], sampling={})

    def refuse(turns):
        raise DataError("no system role")

    assert find_shape(refuse, "") is None
