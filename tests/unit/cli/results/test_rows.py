import io

import pytest
from rich.console import Console

from sftcli.cli.results.audit import bar
from sftcli.cli.results.rows import Legend, RowView
from sftcli.data.rendering.token_view import TokenView
from sftcli.services.prepare.prepare import ShownRow
from tests.support.golden import assert_golden


def token(text: str, *, trained: bool = False, is_control: bool = False, is_stop: bool = False) -> TokenView:
    return TokenView(text=text, ids=(1,), trained=trained, is_control=is_control, is_stop=is_stop)


TOKENS = (
    token("<|im_start|>", is_control=True),
    token("user\n"),
    token("Write  two lines,"),
    token(" and say whether the ferry that leaves the harbour at seven returns before the evening bell. "),
    token("<|im_end|>", is_control=True),
    token("\n"),
    token("<|im_start|>", is_control=True),
    token("assistant\n"),
    token("One\tline,", trained=True),
    token("\n  and a\x1b[31m second.", trained=True),
    token("<|im_end|>", trained=True, is_control=True, is_stop=True),
    token("\n"),
)
ROW = ShownRow(
    origin="rows.jsonl:12", num_tokens=40, num_trained=12, flags=("control-character",), tokens=TOKENS
)


def drawn(columns: int, *, color: bool = False, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=stream,
        width=columns,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        markup=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(Legend())
    console.print(RowView(row=ROW))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("columns", [60, 100])
def test_a_row_reads_well_without_color(columns: int):
    assert_golden(f"views/row-{columns}.txt", drawn(columns))


def test_a_row_reads_well_in_ascii():
    assert_golden("views/row-ascii.txt", drawn(60, encoding="ascii"))


@pytest.mark.parametrize("columns", [20, 60, 100, 160])
def test_no_line_is_wider_than_the_terminal(columns: int):
    assert max(map(len, drawn(columns).splitlines())) <= columns


def test_prompt_trained_text_and_stop_token_have_styles_of_their_own():
    text = drawn(100, color=True)
    assert "\x1b[2muser↵" in text
    assert "\x1b[32mOne\\tline,↵" in text
    assert "\x1b[1;7;32m<|im_end|>■" in text
    assert "\x1b[36m<|im_start|>" in text
    assert "[[" not in text


def test_text_of_a_row_cannot_command_the_terminal():
    assert "\x1b" not in drawn(100)
    assert "\\x1b[31m" in drawn(100)


def test_the_smallest_share_can_be_seen():
    assert (bar(1.0, 8, "utf-8"), bar(0.5, 8, "utf-8")) == ("█" * 8, "█" * 4)
    assert (bar(0.0001, 8, "utf-8"), bar(0.0, 8, "utf-8")) == ("▏", "")
    assert (bar(1.0, 8, "ascii"), bar(0.0001, 8, "ascii")) == ("#" * 8, "#")
