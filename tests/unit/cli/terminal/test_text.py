import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sftcli.cli.terminal.text import (
    ASCII_SIGNS,
    UNICODE_SIGNS,
    clean,
    loss_text,
    norm_text,
    signs,
    sparkline,
    wrapped,
    writable,
)
from sftcli.figures import count, duration, short_count, size, whole_duration

COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00s"),
        (0.042, "0.04s"),
        (1.26, "1.3s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (80, "1m20s"),
        (7500, "2h05m"),
        (90_000, "1d01h"),
        (-3, "0.00s"),
        (math.inf, "?"),
    ],
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moving_times_have_no_decimals() -> None:
    assert [whole_duration(seconds) for seconds in (-1, 0.3, 4.6, 80)] == ["0s", "0s", "5s", "1m20s"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (2_100_000_000, "2.1 GB"), (999_960, "1.0 MB"), (3e12, "3.0 TB")],
)
def test_sizes_have_a_unit(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_counts_have_separators() -> None:
    assert (count(1_234_567), short_count(9_999), short_count(134_515_008)) == (
        "1,234,567",
        "9,999",
        "134.5M",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_say_so(value: float) -> None:
    assert loss_text(value) == norm_text(value) == "not finite"


@given(st.text())
def test_no_text_can_command_the_terminal(text: str) -> None:
    assert not COMMANDS.search(clean(text))


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
def test_printable_text_is_left_alone(text: str) -> None:
    assert clean(text) == text


def test_escapes_are_visible() -> None:
    assert clean("a\x1b[31mb\x07\r\n\x9b\u202e\udc80") == r"a\x1b[31mb\x07\r\n\x9b\u202e\udc80"


def test_line_ends_can_be_kept() -> None:
    assert clean("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_every_text_can_be_written_in_every_encoding(text: str, encoding: str) -> None:
    writable(text, encoding).encode(encoding)


def test_signs_are_ascii_where_the_encoding_is_not_unicode() -> None:
    assert signs("utf-8") is UNICODE_SIGNS
    assert signs("ANSI_X3.4-1968") is signs(None) is signs("cp1252") is ASCII_SIGNS


def test_sparkline_falls_with_the_loss() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, UNICODE_SIGNS.levels) == "█▇▆▅▄▃▂▁"


@given(st.lists(st.floats()), st.integers(0, 50))
@example([0.0, 2.225073858507e-311], 2)
def test_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    assert len(sparkline(values, width, ASCII_SIGNS.levels)) <= width


_WORDS = st.lists(st.text("ab.`", min_size=1, max_size=12), min_size=1, max_size=12).map(" ".join)


@given(st.lists(_WORDS | st.just(" " * 40), max_size=3).map("\n".join), st.integers(12, 60))
def test_wrapping_changes_nothing_but_the_ends_of_lines(text, columns):
    rows = wrapped(text, columns).split("\n")
    assert " ".join(rows).split() == text.split()
    assert all(len(row) <= columns or len(row.split()) <= 1 for row in rows)


@pytest.mark.parametrize("columns", range(24, 60))
def test_a_command_in_backquotes_stays_on_one_row(columns):
    text = "no such option: see `sft train --help`, or (`sft resume my-run`) where it has begun"
    rows = wrapped(text, columns).split("\n")
    assert len(rows) > 1
    assert all(row.startswith("  ") for row in rows[1:])
    assert sum("`sft train --help`" in row for row in rows) == 1
    assert sum("(`sft resume my-run`)" in row for row in rows) == 1


def test_a_command_that_is_longer_than_a_row_is_broken_between_its_words():
    assert wrapped("see `sft train --help --all`", 16) == "see `sft train\n  --help --all`"
