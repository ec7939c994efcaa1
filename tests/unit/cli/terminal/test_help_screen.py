"""Help at the width of the terminal: what is needed first stands first, and nothing of Python is shown."""

import pytest
import typer.main

from sftcli.cli.app import app
from sftcli.cli.terminal.help_screen import COMMANDS
from tests.support.golden import assert_golden

NAMES = sorted(typer.main.get_command(app).commands)


def screen(name: str, columns: int, monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    app([*([name] if name else []), "--help"], prog_name="sft", standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["", *NAMES])
def test_no_line_is_too_long_and_nothing_of_python_is_shown(name, columns, monkeypatch, capsys):
    shown = screen(name, columns, monkeypatch, capsys)
    lines = [
        line for line in shown.splitlines() if not line.startswith("  sft ")
    ]  # commands are never broken
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert not [part for part in ("<", "[[", "None", "str]", "x>=") if part in shown]
    assert shown.rstrip().splitlines()[-1].split()[:2] == ["-h,", "--help"]


def test_what_must_be_given_stands_without_brackets_and_a_list_keeps_its_own(monkeypatch, capsys):
    assert screen("push", 80, monkeypatch, capsys).startswith("Usage: sft push [OPTIONS] NAME [RUN]\n")
    assert "--tasks NAME[,NAME] " in screen("eval", 80, monkeypatch, capsys)


def test_help_of_train_is_what_a_person_read_and_found_good(monkeypatch, capsys):
    assert_golden("views/help-train.txt", screen("train", 80, monkeypatch, capsys))


def test_what_most_people_need_stands_in_the_first_panel(monkeypatch, capsys):
    first = screen("train", 80, monkeypatch, capsys).split("\n\n")[3]
    wanted = (
        "--data",
        "--model",
        "--run",
        "--lora",
        "--learning-rate",
        "--epochs",
        "--batch-size",
        "--max-steps",
    )
    assert [flag for flag in wanted if flag in first] == list(wanted)


def test_every_command_has_its_place():
    assert sorted(name for names in COMMANDS.values() for name in names) == NAMES
