"""Tokenizers that end, freeze or fill a process are refused by name before the command reads them."""

import json
import time
from pathlib import Path

import pytest

from sftcli.errors import DataError
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from tests.support.tiny_tokenizer import (
    FAMILIES,
    build_family_tokenizer,
    build_metaspace_tokenizer,
    build_tiny_tokenizer,
)


def replace(text: str, by: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def around(ids: int) -> dict[str, object]:
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    token = {"id": "x", "ids": [0] * ids, "tokens": ["x"] * ids}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, first]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [first, second],
        "special_tokens": {"x": token},
    }


def changed(folder: Path, **parts: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


HOSTILE = {
    "grows": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("zebra", "zebra" * 10)] * 9}},
        r"makes a text up to .* times as long",
    ),
    "prepends": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 2000}]}},
        r"makes a text up to .* times as long",
    ),
    "surrounds": ({"post_processor": around(5000)}, "puts 5000 tokens around each text"),
    "goes back": ({"pre_tokenizer": split(r"(a+)+$")}, "a library fails on it: Onig"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_grows_or_panics_is_refused(name, tmp_path):
    parts, words = HOSTILE[name]
    folder = changed(build_tiny_tokenizer(tmp_path / "it"), **parts)
    began = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        read_tokenizer_files(folder)
    assert str(folder / "tokenizer.json") in caught.value.message
    assert time.monotonic() - began < 60


def test_an_id_of_four_thousand_million_is_refused(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "it")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"][next(reversed(model["vocab"]))] = 4_000_000_000
    with pytest.raises(DataError, match="a token with the id 4000000000; the limit is 10000000"):
        read_tokenizer_files(changed(folder, model=model))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_as_models_have_them_pass(family, tmp_path):
    assert read_tokenizer_files(build_family_tokenizer(tmp_path, family)).templates


@pytest.mark.parametrize("scheme", ["first", "prepend"])
def test_tokenizers_with_a_letter_for_spaces_pass(scheme, tmp_path):
    assert read_tokenizer_files(build_metaspace_tokenizer(tmp_path, scheme)).tokenizer


def test_a_template_that_never_ends_is_no_fault_of_the_tokenizer(tmp_path):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert read_tokenizer_files(build_tiny_tokenizer(tmp_path, template=endless)).templates
