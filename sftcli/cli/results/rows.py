"""A prepared row as the model sees it: what is trained, where generation stops, and every character that could hide."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from sftcli.cli.terminal.text import clean, signs, writable
from sftcli.figures import count, percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from sftcli.data.rendering.token_view import TokenView
    from sftcli.services.prepare.prepare import ShownRow

PROMPT, CONTROL, TRAINED, STOP = "dim", "cyan", "green", "bold green reverse"
OPEN, CLOSE = "[[", "]]"  # around trained text where there is no color
_HIDDEN_SPACE = re.compile(r"^ | (?= )|(?<= ) | $")  # at an end, or one of several
_INDENT = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """A row under a line with its place and its counts."""

    row: "ShownRow"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Draw the head and the text, which is folded at the width of the terminal."""
        row = self.row
        head = Text(writable(clean(row.origin), console.encoding), style="bold", overflow="fold")
        share = percent(row.num_trained / row.num_tokens if row.num_tokens else 0.0)
        facts = [f"{count(row.num_tokens)} tokens, {count(row.num_trained)} trained ({share})", *row.flags]
        head.append(f"{_INDENT}{', '.join(facts)}", style="not bold dim")
        for line in head.wrap(console, options.max_width):
            line.rstrip()
            yield line
        text = Text(overflow="fold")
        for piece, style in _pieces(row.tokens, console):
            text.append(piece, style=style)
        lines = text.wrap(console, max(8, options.max_width - len(_INDENT)))
        for line in lines[:-1] if len(lines) and not lines[-1].plain else lines:
            line.rstrip()
            yield Text(_INDENT) + line if line.plain else line
        yield Text()


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """One line that says how to read rows."""

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Draw it as rows are drawn."""
        marks = _Marks.of(console)
        legend = Text(overflow="fold")
        if console.color_system is None:
            legend.append(f"{OPEN}trained{CLOSE}")
        else:
            for name, style in (("prompt", PROMPT), ("<control token>", CONTROL), ("trained", TRAINED)):
                legend.append(name, style=style)
                legend.append("  ")
        legend.append("  stop token " if console.color_system is None else "stop token ")
        legend.append(marks.stop, style=STOP if console.color_system else "")
        legend.append(
            f"  line end {marks.line_end}" + (f"  space {marks.space}" if marks.space != " " else "")
        )
        yield legend


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marks:
    """Signs for what cannot be seen."""

    line_end: str
    space: str
    stop: str

    @classmethod
    def of(cls, console: "Console") -> "_Marks":
        if signs(console.encoding).ellipsis == "...":
            return cls(line_end="\\n", space=" ", stop="(stop)")
        return cls(line_end="↵", space="·", stop="■")


def _pieces(tokens: Sequence["TokenView"], console: "Console") -> Iterator[tuple[str, str]]:
    """Yield text and style of each stretch of tokens that are alike."""
    marks, is_plain = _Marks.of(console), console.color_system is None
    for is_trained, stretch in groupby(tokens, key=lambda token: token.trained):
        if is_trained and is_plain:
            yield OPEN, ""
        for (is_control, is_stop), run in groupby(
            stretch, key=lambda token: (token.is_control, token.is_stop)
        ):
            text = _visible("".join(token.text for token in run), marks, console.encoding)
            style = TRAINED if is_trained else CONTROL if is_control else PROMPT
            yield (f"{text}{marks.stop}", STOP) if is_stop else (text, style)
        if is_trained and is_plain:
            yield CLOSE, ""


def _visible(text: str, marks: _Marks, encoding: str) -> str:
    lines = [writable(_HIDDEN_SPACE.sub(marks.space, clean(line)), encoding) for line in text.split("\n")]
    return f"{marks.line_end}\n".join(lines)
