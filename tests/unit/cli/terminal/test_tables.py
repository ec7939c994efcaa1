import io
import json
import math

import pytest
from rich.console import Console

from sftcli.cli.terminal.tables import (
    Pair,
    comparison_table,
    key_value_table,
    make_console,
    settings_table,
    show_result_json,
    show_text,
)
from tests.support.fake_run import HOSTILE
from tests.support.golden import assert_golden

SETTINGS = settings_table(
    [
        ("training.learning_rate", 2e-5, "--set"),
        ("training.warmup_steps", None, "default"),
        ("data.sources", ("rows.jsonl", "more.jsonl"), "preset quick"),
        ("data.heldout_sources", (), "default"),
    ]
)
COMPARISON = comparison_table(
    [
        Pair(metric="held-out loss (nats/token)", first=2.314, second=0.612, lower_is_better=True, rows=120),
        Pair(metric="exact match (%)", first=None, second=71.0, lower_is_better=False, digits=1, rows=10),
        Pair(metric="perplexity", first=math.inf, second=1.84, lower_is_better=True),
    ]
)
PAIRS = key_value_table(
    [("model", "smollm2-135m"), ("note", "a sentence of several words " * 4), ("seed", None)]
)


def render(*tables: object, columns: int = 100, color: bool = False, encoding: str = "utf-8") -> str:
    binary = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(binary, encoding=encoding, newline="\n", write_through=True),
        force_terminal=True,
        color_system="standard" if color else None,
        width=columns,
        markup=False,
        highlight=False,
        _environ={},
    )
    for table in tables:
        console.print(table)
    return binary.getvalue().decode(encoding)


@pytest.mark.parametrize("columns", [20, 40, 60, 100])
def test_tables_are_good_to_look_at(columns: int) -> None:
    assert_golden(f"views/tables-{columns}.txt", "\n".join(render(t, columns=columns) for t in TABLES))


TABLES = (SETTINGS, COMPARISON, PAIRS)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_lines_stay_inside_the_terminal(columns: int) -> None:
    assert max(len(line) for line in render(*TABLES, columns=columns).splitlines()) <= columns


def test_off_a_terminal_a_row_is_a_line() -> None:
    stream = io.StringIO()
    for table in TABLES:
        make_console(stream).print(table)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 + 4 + 3
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in stream.getvalue()


def loss(first: float, second: float, rows: int = 0) -> Pair:
    return Pair(metric="loss", first=first, second=second, lower_is_better=True, rows=rows)


def match(first: float, second: float) -> Pair:
    return Pair(metric="match", first=first, second=second, lower_is_better=False)


def test_a_better_value_is_green_and_a_worse_one_red() -> None:
    better = comparison_table([loss(2.0, 1.0), match(1.0, 2.0)])
    worse = comparison_table([loss(1.0, 2.0), match(2.0, 1.0)])
    same = comparison_table([loss(1.0, 1.0001), loss(1.0, 1.04, rows=3)])
    assert render(better, color=True).count("\x1b[32m") == 2
    assert render(worse, color=True).count("\x1b[31m") == 2
    assert "\x1b[3" not in render(same, color=True)


def test_only_columns_that_say_something_are_drawn() -> None:
    alone = Pair(metric="loss", first=None, second=1.0, lower_is_better=True)
    text = render(comparison_table([alone], names=("base", "tuned")))
    assert text.split() == ["metric", "tuned", "loss", "1.000"]


def test_what_is_neither_better_nor_worse_has_no_difference() -> None:
    length = Pair(metric="length", first=30.0, second=20.0, lower_is_better=None, digits=0)
    assert render(comparison_table([length])).splitlines()[1].split() == ["length", "30", "20", "-"]


def test_cells_from_outside_are_literal_in_every_encoding() -> None:
    for encoding in ("ascii", "utf-8"):
        text = render(key_value_table([("[b]", HOSTILE)]), encoding=encoding)
        assert "\x1b" not in text
        assert "[b]" in text
        assert r"\x1b]52;c;aGk=\x07\x1b[31m[/] [bold]red" in text


def test_color_off_a_terminal_needs_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in printed()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed()


def printed() -> str:
    stream = io.StringIO()
    make_console(stream).print(SETTINGS)
    return stream.getvalue()


def test_text_is_shown_as_it_is_and_unwrapped() -> None:
    stream = io.StringIO()
    show_text("x" * 300 + "\n[red]:smile: \x1b[0m", make_console(stream))
    assert stream.getvalue() == "x" * 300 + "\n[red]:smile: \\x1b[0m\n"


def test_a_result_is_one_object_in_ascii_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show_result_json({"loss": math.nan, "rows": [{"text": HOSTILE, "n": math.inf}], "pair": (1, None, True)})
    text = capsys.readouterr().out
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "ok": True,
        "loss": None,
        "rows": [{"text": HOSTILE, "n": None}],
        "pair": [1, None, True],
    }


def test_a_result_that_has_no_json_form_is_a_bug() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        show_result_json({"x": object()})
