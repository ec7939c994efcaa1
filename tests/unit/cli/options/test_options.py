import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.cli.options.shared import Color, Output, OutputMode, choose_output, use_color
from sftcli.errors import UsageError


def choose(
    output: Output | None = None, *, is_terminal: bool = True, columns: int = 100, **env: str
) -> OutputMode:
    return choose_output(output or Output(), is_terminal=is_terminal, columns=columns, environment=env)


def test_a_terminal_gets_the_live_view() -> None:
    assert choose(TERM="xterm-256color") is OutputMode.RICH


@pytest.mark.parametrize(
    "env", [{"CI": "true"}, {"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}], ids=lambda env: next(iter(env))
)
def test_a_terminal_that_nobody_watches_gets_lines(env: dict[str, str]) -> None:
    assert choose(**env) is OutputMode.PLAIN


def test_a_narrow_terminal_gets_lines() -> None:
    assert [choose(columns=columns) for columns in (39, 40)] == [OutputMode.PLAIN, OutputMode.RICH]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "CLICOLOR_FORCE"])
def test_forced_color_does_not_make_a_log_live(name: str) -> None:
    assert choose(is_terminal=False, **{name: "1"}) is OutputMode.PLAIN


def test_json_and_quiet_are_silent() -> None:
    assert choose(Output(json=True)) is OutputMode.JSON
    assert choose(Output(quiet=True)) is OutputMode.QUIET


@pytest.mark.parametrize(
    ("color", "env", "is_terminal", "expected"),
    [
        (Color.AUTO, {}, True, True),
        (Color.AUTO, {}, False, False),
        (Color.AUTO, {"NO_COLOR": "1"}, True, False),
        (Color.AUTO, {"NO_COLOR": ""}, True, True),
        (Color.AUTO, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        (Color.AUTO, {"FORCE_COLOR": "1"}, False, True),
        (Color.AUTO, {"TERM": "dumb"}, True, False),
        (Color.NEVER, {"FORCE_COLOR": "1"}, True, False),
        (Color.ALWAYS, {"NO_COLOR": "1"}, False, True),
    ],
)
def test_the_flag_beats_no_color_beats_force_color_beats_the_terminal(
    color: Color, env: dict[str, str], is_terminal: bool, expected: bool
) -> None:
    assert use_color(color, is_terminal=is_terminal, environment=env) is expected


@pytest.mark.parametrize("words", [["resume", "a"], ["train"]])
def test_a_slip_in_a_variable_is_refused_by_train_and_resume_alike(monkeypatch, words):
    monkeypatch.setenv("SFT_TRAINIG__MAX_STEPS", "3")
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UsageError)
    assert "SFT_TRAINING__MAX_STEPS" in result.exception.message
