"""What stands behind an answer that did not end by itself."""

from pathlib import Path

import pytest

from sftcli.cli.options.shared import Output
from sftcli.cli.results.answers import show_completions
from sftcli.config.schema.run import SamplingSettings
from sftcli.config.schema.training import Precision
from sftcli.services.generate.answerer import Completion
from sftcli.services.generate.request import GenerateRequest

ASKED = GenerateRequest(
    prompt="hello", sampling=SamplingSettings(), root=Path("runs"), precision=Precision.FP32
)


@pytest.mark.parametrize(
    ("finish", "tokens", "told"),
    [
        ("stop", 3, ""),
        ("length", 3, "cut after 3 tokens; --max-new-tokens allows more\n"),
        ("stopped", 0, "stopped after 0 tokens\n"),
        ("stopped", 1, "stopped after 1 token\n"),
    ],
)
def test_an_answer_that_was_cut_says_why(capsys, finish, tokens, told):
    completion = Completion(
        text="",
        model="m",
        prompt_tokens=1,
        new_tokens=tokens,
        finish=finish,
        logprob=0.0,
        confidence=1.0,
        seconds=0.0,
    )
    show_completions([completion], ASKED, Output())
    assert capsys.readouterr().err == told
