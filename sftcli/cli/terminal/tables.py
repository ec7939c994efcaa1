"""Results as tables, the consoles they go to, and results as JSON.

Tables have no borders. Where one does not fit it is stacked, name over values; off a terminal it is as wide as it needs
to be, so that ``grep`` and ``cut`` see whole lines.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sftcli.cli.options.shared import Color, use_color
from sftcli.cli.terminal.text import clean, writable
from sftcli.errors import redact
from sftcli.figures import NOTHING, carried, change, figure, setting_text

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderResult

    from sftcli.services.report.measures import Compared

Align = Literal["left", "right"]

_GAP = 2
_OFF_TERMINAL_COLUMNS = 10_000  # nothing is cut or wrapped in a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Text of a table and its Rich style. The text may come from outside; it is made harmless when it is drawn."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table without borders.

    Args:
        rows: Equally long rows.
        header: Column names; empty for none.
        aligns: One per column; short means left.
    """

    rows: Sequence[Sequence[Cell]]
    header: Sequence[str] = ()
    aligns: Sequence[Align] = ()

    def __rich_console__(self, console: Console, options: "ConsoleOptions") -> "RenderResult":
        """Draw in columns where they fit, else stacked."""
        names = [Cell(text=name, style="dim") for name in self.header]
        table = [names, *self.rows] if names else list(self.rows)
        if not table:
            return
        drawn = [[_draw(cell, console.encoding) for cell in row] for row in table]
        widths = [max(cell_len(row[i].plain) for row in drawn) for i in range(len(drawn[0]))]
        if self._fits(widths, options.max_width):
            for row in drawn:
                yield self._line(row, widths, options.max_width)
        else:
            yield from self._stacked(drawn, has_header=bool(names))

    def _fits(self, widths: Sequence[int], columns: int) -> bool:
        """Return whether all but the last column fit with room for the last one, which may wrap."""
        fixed = sum(widths[:-1]) + _GAP * (len(widths) - 1)
        is_prose = len(widths) == 2 and not self.header
        last = min(widths[-1], 24) if is_prose else widths[-1]
        return fixed + last <= columns

    def _line(self, row: Sequence[Text], widths: Sequence[int], columns: int) -> Text:
        indent = sum(widths[:-1]) + _GAP * (len(widths) - 1)
        parts = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - cell_len(cell.plain))
            is_right = index < len(self.aligns) and self.aligns[index] == "right"
            is_last = index == len(row) - 1
            if is_last and indent + width > columns:
                parts.append(_hang(cell, indent, columns))
            elif is_right:
                parts.append(Text(blank) + cell)
            else:
                parts.append(cell if is_last else cell + Text(blank))
        line = Text(" " * _GAP).join(parts)
        line.rstrip()
        return line

    def _stacked(self, drawn: Sequence[Sequence[Text]], *, has_header: bool) -> "RenderResult":
        names = drawn[0] if has_header else None
        for row in drawn[1:] if has_header else drawn:
            yield row[0]
            for index, cell in enumerate(row[1:], start=1):
                if not cell.plain:
                    continue
                name = names[index] + Text(" ") if names is not None else Text("")
                yield Text("  ") + name + cell


def _draw(cell: Cell, encoding: str) -> Text:
    return Text(writable(redact(clean(cell.text)), encoding), style=cell.style, overflow="fold")


def _hang(cell: Text, indent: int, columns: int) -> Text:
    """Return ``cell`` folded at ``columns``, its later lines under its first."""
    room = max(8, columns - indent)
    lines, current = [], ""
    for word in cell.plain.split(" "):
        joined = f"{current} {word}" if current else word
        if cell_len(joined) <= room:
            current = joined
            continue
        if current:
            lines.append(current)
        while cell_len(word) > room:
            lines.append(word[:room])
            word = word[room:]
        current = word
    lines.append(current)
    return Text(("\n" + " " * indent).join(lines), style=cell.style)


def key_value_table(rows: Sequence[tuple[str, object]]) -> Grid:
    """Return names and values, two columns. ``None`` shows as a dash."""
    return Grid(
        rows=[
            [Cell(text=name, style="dim"), Cell(text="-" if value is None else str(value))]
            for name, value in rows
        ]
    )


def settings_table(rows: Sequence[tuple[str, object, str]]) -> Grid:
    """Return settings as key, value, origin; what is not a default stands out."""
    return Grid(
        header=("setting", "value", "from"),
        rows=[
            [
                Cell(text=key),
                Cell(text=setting_text(value), style="" if origin == "default" else "bold"),
                Cell(text=origin, style="dim" if origin == "default" else "cyan"),
            ]
            for key, value, origin in rows
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A metric of two models; ``None`` where it was not measured. ``rows`` is how many it was measured on, 0 if not known."""

    metric: str
    first: float | None
    second: float | None
    lower_is_better: bool | None  # None where neither is, and a difference says nothing
    digits: int = 3
    rows: int = 0


def comparison_table(pairs: Sequence[Pair], *, names: tuple[str, str] = ("base", "tuned")) -> Grid:
    """Return metrics of two models called ``names``, with the difference, green where the second is better, and the rows.

    Where nothing of the first was measured there is a column for the second alone.
    """
    has_rows = any(pair.rows for pair in pairs)
    has_first = any(pair.first is not None for pair in pairs)
    body = []
    for pair in pairs:
        first, second = (
            Cell(text=figure(value, pair.digits, pair.rows)) for value in (pair.first, pair.second)
        )
        values = [first, second, _difference(pair)] if has_first else [second]
        count = [Cell(text=f"{pair.rows:,}" if pair.rows else NOTHING)] if has_rows else []
        body.append([Cell(text=pair.metric), *values, *count])
    columns = (*names, "difference") if has_first else names[1:]
    return Grid(
        header=("metric", *columns, *(["rows"] if has_rows else [])),
        aligns=("left", "right", "right", "right", "right"),
        rows=body,
    )


def measures_table(measures: "Sequence[Compared]", *, names: tuple[str, str]) -> Grid:
    """Return the measures of an evaluation of two models called ``names``; see ``comparison_table``."""
    pairs = [
        Pair(
            metric=one.measure.label,
            first=one.base,
            second=one.tuned,
            lower_is_better=one.measure.lower_is_better,
            digits=one.measure.digits,
            rows=one.rows,
        )
        for one in measures
    ]
    return comparison_table(pairs, names=names)


def _difference(pair: Pair) -> Cell:
    if pair.first is None or pair.second is None or pair.lower_is_better is None:
        return Cell(text=NOTHING)
    difference = pair.second - pair.first
    style = ""
    if isfinite(difference) and round(difference, carried(pair.digits, pair.rows)):
        style = "green" if (difference < 0) == pair.lower_is_better else "red"
    return Cell(text=change(difference, pair.digits, pair.rows), style=style)


def out(color: Color = Color.AUTO) -> Console:
    """Return the console for results, on stdout."""
    return make_console(sys.stdout, color)


def err(color: Color = Color.AUTO) -> Console:
    """Return the console for progress, warnings and errors, on stderr."""
    return make_console(sys.stderr, color)


def make_console(stream: "TextIO", color: Color = Color.AUTO) -> Console:
    """Return a console that prints text as it is: no markup, no emoji codes, no highlighting of numbers."""
    is_terminal = stream.isatty()
    colored = use_color(color, is_terminal=is_terminal)
    # Without a color system Rich writes no style at all; its own no_color would leave bold and dim.
    return Console(
        file=stream,
        force_terminal=is_terminal,
        force_interactive=is_terminal,
        color_system=("auto" if is_terminal else "standard") if colored else None,
        no_color=not colored,
        width=None if is_terminal else _OFF_TERMINAL_COLUMNS,
        markup=False,
        emoji=False,
        highlight=False,
    )


def show_text(text: str, console: Console, *, wrap: bool = False) -> None:
    """Print text of one or more lines, made harmless.

    With ``wrap`` a terminal gets whole words in each row. Without it, lines stay whole, so that paths and commands can be copied.
    """
    safe = writable(clean(text, keep="\n\t"), console.encoding)
    console.print(Text(safe), soft_wrap=not wrap)


def show_result_json(result: Mapping[str, object]) -> None:
    """Print ``result`` as the one JSON object of a command, with ``ok``; numbers that are not finite become null.

    Only ASCII is written: it is safe in every encoding and on every terminal.
    """
    write_json({"ok": True, **result})


def write_json(value: Mapping[str, object]) -> None:
    """Write one JSON object and a line end to stdout."""
    sys.stdout.write(json.dumps(_plain(value), allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    """Return ``value`` in types that JSON has.

    Raises:
        TypeError: It holds something that has no JSON form.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, str):
        return writable(value, "utf-8")  # half a surrogate pair is no JSON text
    if isinstance(value, Mapping):
        return {writable(str(key), "utf-8"): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    raise TypeError(f"{type(value).__name__} has no JSON form")
