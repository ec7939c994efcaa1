"""What stands behind an answer that did not end by itself."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sftcli.cli.options.shared import Output
from sftcli.cli.results.answers import show_completions, with_text
from sftcli.cli.views.live import LiveView
from sftcli.config.schema.run import SamplingSettings
from sftcli.config.schema.training import Precision
from sftcli.events import Notice, TextDelta
from sftcli.services.generate.answerer import Completion
from sftcli.services.generate.request import GenerateRequest


def completion_of(finish: str, tokens: int) -> Completion:
    return Completion(
        text="",
        model="m",
        prompt_tokens=1,
        new_tokens=tokens,
        finish=finish,
        logprob=0.0,
        confidence=1.0,
        seconds=0.0,
    )


ASKED = GenerateRequest(
    prompt="hello", sampling=SamplingSettings(), root=Path("runs"), precision=Precision.FP32
)


@pytest.mark.parametrize(
    ("finish", "tokens", "told"),
    [
        ("stop", 3, ""),
        ("length", 3, "cut after 3 tokens: the model was made for no more positions\n"),
        ("length", 256, "cut after 256 tokens; --max-new-tokens allows more\n"),
        ("stopped", 0, "stopped after 0 tokens\n"),
        ("stopped", 1, "stopped after 1 token\n"),
    ],
)
def test_an_answer_that_was_cut_says_why(capsys, finish, tokens, told):
    show_completions([completion_of(finish, tokens)], ASKED, Output())
    assert capsys.readouterr().err == told


def test_an_answer_that_a_server_cut_says_so(capsys):
    asked = replace(ASKED, checkpoint="http://localhost:8080")
    show_completions([completion_of("length", 3)], asked, Output())
    assert capsys.readouterr().err == "cut after 3 tokens: the server has no room for more\n"


def test_an_answer_stays_in_one_piece_where_a_waiting_time_was_shown_before_it(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stdout", out)
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    view = LiveView(console=screen, get_time=lambda: now[0], auto_refresh=False, redirect_stdout=True)
    view(Notice(text="loading"))
    now[0] = 3.0
    view.refresh()
    assert sys.stdout is not out  # the waiting time is on the screen
    writer = with_text(view)
    for text in ("It", " is", " 3"):
        writer(TextDelta(text=text))
    view.close()
    assert out.getvalue() == "It is 3"
