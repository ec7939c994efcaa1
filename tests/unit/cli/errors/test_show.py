import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from sftcli.cli.errors.show import guarded, show_error
from sftcli.cli.options.shared import Color
from sftcli.cli.session.signals import CommandStopped
from sftcli.errors import DataError, DivergedError, Location, SftError, UsageError
from tests.support.fake_run import HOSTILE
from tests.support.golden import assert_golden

Captured = pytest.CaptureFixture[str]


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('[training]\nlearning_rte = 1e-4 # "caf\u00e9"\n', encoding="utf-8")
    return "run.toml"


def test_errors_are_good_to_read(settings_file: str, capsys: Captured) -> None:
    errors: list[SftError] = [
        UsageError("no preset 'qick'", hint="did you mean 'quick'?"),
        UsageError(
            "run.toml:2: unknown key 'learning_rte'",
            hint="did you mean 'learning_rate'?",
            location=Location(file=settings_file, line=2, column=1),
        ),
        DataError("the response is null, not text", location=Location(file="rows.jsonl", line=17)),
        UsageError("batch_size must be at least 1", location=Location(key="training.batch_size")),
        UsageError("2 problems:\n  a is wrong\n  b is wrong"),
        DivergedError("no finite loss in 3 steps in a row"),
        DataError(f"cannot read {HOSTILE}", hint=HOSTILE, location=Location(file=HOSTILE, line=3)),
    ]
    for error in errors:
        show_error(error, command="sft train")
        sys.stderr.write("\n")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_golden("views/errors.txt", captured.err)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_alone_gets_lines_broken_between_words(
    is_terminal: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "40")
    show_error(UsageError("a word " * 8 + "end", hint="x" * 25 + "; see `sft train --help`"), command="sft")
    rows = capsys.readouterr().err.splitlines()
    assert len(rows) == (4 if is_terminal else 2)
    assert all(len(row) <= 40 for row in rows) is is_terminal
    assert any("`sft train --help`" in row for row in rows)


def test_color_marks_the_parts(capsys: Captured) -> None:
    show_error(UsageError("no", hint="yes"), command="sft", color=Color.ALWAYS)
    assert capsys.readouterr().err == "\x1b[1;31merror:\x1b[0m no\n\x1b[1mhelp:\x1b[0m yes\n"


def test_json_failure_is_one_object_on_stdout(capsys: Captured) -> None:
    where = Location(file="rows.jsonl", line=17, column=4, key="response")
    code = guarded(
        raising(DataError("bad row", hint="fix it", location=where)), command="sft train", json=True
    )
    captured = capsys.readouterr()
    assert (code, captured.err) == (65, "")
    assert json.loads(captured.out) == {
        "ok": False,
        "exit_code": 65,
        "error": {
            "kind": "data",
            "message": "bad row",
            "hint": "fix it",
            "file": "rows.jsonl",
            "line": 17,
            "column": 4,
            "key": "response",
        },
    }


@pytest.mark.parametrize(
    ("result", "code"), [(None, 0), (0, 0), (3, 3), ("path", 0)], ids=["none", "zero", "three", "text"]
)
def test_the_exit_code_is_what_the_command_returns(result: object, code: int) -> None:
    assert guarded(lambda: result, command="sft") == code


@pytest.mark.parametrize("kind", SftError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code(kind: type[SftError], capsys: Captured) -> None:
    error = kind("x") if kind.__init__ is SftError.__init__ else kind()
    assert guarded(raising(error), command="sft") == kind.exit_code
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bug_is_reported_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert guarded(raising(ZeroDivisionError("hf_" + "C4n4ry" * 5)), command="sft train") == 1
    (log,) = (tmp_path / "sft" / "log").iterdir()
    shown = capsys.readouterr().err
    assert shown == (
        "error: sft train hit a bug: ZeroDivisionError: ***\n"
        f"help: the traceback is in {log}; please report it\n"
    )
    assert log.read_text().startswith("Traceback")
    assert "C4n4ry" not in log.read_text()


def test_a_bug_is_reported_in_a_temporary_file_where_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guarded(raising(ZeroDivisionError()), command="sft train") == 1
    assert f"{tmp_path}/sft-train-" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("SFT_DEBUG", "1")
    guarded(raising(ZeroDivisionError("\x1b[31m")), command="sft train")
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "\x1b" not in shown


def test_a_bug_is_an_object_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert guarded(raising(ZeroDivisionError()), command="sft train", json=True) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "internal"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (CommandStopped("nothing was kept", 143), 143),
        (SystemExit(7), 7),
        (SystemExit(None), 0),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_ends_that_are_no_faults_have_their_codes(error: BaseException, code: int, capsys: Captured) -> None:
    assert guarded(raising(error), command="sft train") == code
    assert "error" not in capsys.readouterr().err


def test_a_stopped_command_still_prints_its_object(capsys: Captured) -> None:
    assert guarded(raising(CommandStopped("nothing was kept", 143)), command="sft", json=True) == 143
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "stopped"


def test_a_full_disk_is_74(capsys: Captured) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
    assert guarded(raising(full), command="sft train") == 74
    assert capsys.readouterr().err == (
        "error: no space left for runs/x\nhelp: free some space and run it again\n"
    )


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.EDQUOT, 74, "no space left for runs/x"),
        (errno.EIO, 74, "the disk failed for runs/x: Input/output error"),
        (errno.EMFILE, 74, "the disk failed for runs/x: Too many open files"),
        (errno.EROFS, 73, "the disk takes no writes for runs/x: Read-only file system"),
        (errno.ENOTDIR, 1, "hit a bug"),
    ],
)
def test_an_error_of_a_disk_that_nobody_expected_is_no_bug(
    number: int, code: int, words: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    error = OSError(number, os.strerror(number), "runs/x")
    assert guarded(raising(error), command="sft train") == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_arguments_are_told_like_every_other_error(
    as_json: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer(rich_markup_mode="rich")

    @app.command("train")
    def train(preset: str = "") -> None:
        pass

    @app.command("other")
    def other() -> None:
        pass

    run = ["train", "--preste", "x"]
    monkeypatch.setattr("sys.argv", ["sft", *run])
    code = guarded(
        lambda: app(run, prog_name="sft", standalone_mode=False), command="sft train", json=as_json
    )
    captured = capsys.readouterr()
    assert code == 2
    if as_json:
        error = json.loads(captured.out)["error"]
        assert (error["kind"], error["hint"]) == (
            "usage",
            "did you mean '--preset'? see `sft train --help`",
        )
    else:
        assert captured.err.startswith("error: no such option")
        assert "--preset" in captured.err


def test_a_program_without_arguments_shows_its_help_and_no_error(capsys: Captured) -> None:
    app = typer.Typer(no_args_is_help=True)
    app.command("one")(lambda: None)
    app.command("two")(lambda: None)
    assert guarded(lambda: app([], prog_name="sft", standalone_mode=False), command="sft") == 2
    captured = capsys.readouterr()
    assert "Usage: sft" in captured.out
    assert captured.err == ""
