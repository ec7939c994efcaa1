"""Whatever text data, files, hubs and models bring: on its way to a terminal no byte of it commands the terminal."""

import contextlib
import io
import re

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sftcli.cli.errors.show import show_error
from sftcli.cli.options.shared import Color
from sftcli.cli.results.answers import TextWriter
from sftcli.cli.results.rows import RowView
from sftcli.cli.terminal import tables
from sftcli.cli.views.plain import PlainView
from sftcli.data.rendering.token_view import TokenView
from sftcli.errors import DataError, Location
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    Judged,
    ModelLoaded,
    ModelSaved,
    Notice,
    RunStarted,
    TextDelta,
    Warned,
)
from sftcli.services.prepare.prepare import ShownRow

# Introducers of terminal commands, what ends them, markup, and text in between.
BITS = ["\x1b", "\x9b", "\x9d", "]52;c;", "[2J", "\x07", "\x1b\\", "\x08", "\r", "\n", "\x7f", "\u202e", "\u2066",
        "\udc9b", "[/]", "[bold red]", ":smile:", "a", "é", "☃"]  # fmt: skip
HOSTILE = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=3)), max_size=12).map("".join)
COMMANDS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
STYLES = re.compile(r"\x1b\[[0-9;]*m")  # which the program writes itself


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def events_of(text: str) -> list[object]:
    """An event of each kind that carries text from elsewhere."""
    return [
        RunStarted(run=text, path=text),
        Notice(text=text),
        Warned(text=text),
        ModelLoaded(name=text, parameters=1, trainable=1, device=text, precision=text),
        Judged(step=1, kind="spike", reason=text, advice=text),
        CheckpointSaved(step=1, path=text, seconds=0.1),
        ModelSaved(path=text, pt=text),
        DataPrepared(
            source=text, schema=text, rows=1, kept=1, rejected={text: 1}, train_examples=1, heldout_examples=0,
            train_tokens=1, response_tokens=1, cached=False,
        ),
    ]  # fmt: skip


@given(HOSTILE)
def test_no_event_commands_the_terminal(text: str) -> None:
    stream = Terminal()
    view = PlainView(stream=stream, get_time=lambda: 0.0, every_steps=1)
    for event in events_of(text):
        view(event)
    writer = TextWriter(view=view, stream=stream, raw=False)
    writer(TextDelta(text=text.replace("\t", " ")))
    assert not COMMANDS.search(stream.getvalue())


@given(HOSTILE, HOSTILE)
def test_no_error_commands_the_terminal(message: str, place: str) -> None:
    shown = Terminal()
    error = DataError(message, hint=message, location=Location(file=place, line=1, key=place))
    with contextlib.redirect_stderr(shown):
        show_error(error, command="sft prepare", color=Color.NEVER)
    assert not COMMANDS.search(shown.getvalue())


@given(HOSTILE)
@hypothesis_settings(max_examples=50)
def test_no_table_and_no_row_commands_the_terminal(text: str) -> None:
    shown = Terminal()
    console = tables.make_console(shown, Color.ALWAYS)
    tables.show_text(text.replace("\t", " "), console)
    console.print(tables.key_value_table([(text, text)]))
    console.print(tables.settings_table([(text, text, text)]))
    console.print(
        tables.comparison_table(
            [tables.Pair(metric=text, first=1.0, second=2.0, lower_is_better=True)], names=(text, text)
        )
    )
    token = TokenView(text=text, ids=(1,), trained=True, is_control=False, is_stop=False)
    console.print(RowView(row=ShownRow(origin=text, num_tokens=1, num_trained=1, flags=(), tokens=(token,))))
    assert not COMMANDS.search(STYLES.sub("", shown.getvalue()))
