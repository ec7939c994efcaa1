"""The screens of ``--help``: panels by how often they are needed, flags with what they take, and nothing of Python."""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from sftcli.cli.options.flags import (
    ADAPTER_PANEL,
    MAIN_PANEL,
    MODEL_PANEL,
    ROWS_PANEL,
    RUN_PANEL,
    SAMPLING_PANEL,
    SETTINGS_PANEL,
    TRAINING_PANEL,
)
from sftcli.cli.options.shared import OUTPUT_PANEL

if TYPE_CHECKING:
    from rich.console import Console

PANELS = (
    MAIN_PANEL, ROWS_PANEL, TRAINING_PANEL, ADAPTER_PANEL, SAMPLING_PANEL, MODEL_PANEL, SETTINGS_PANEL, RUN_PANEL, OUTPUT_PANEL,
)  # fmt: skip
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Train": ("prepare", "try", "train", "resume"),
    "Use what was trained": ("generate", "eval", "export", "push"),
    "Look": ("report", "runs", "show", "diff", "presets", "schema", "env", "doctor"),
}
MOST_COLUMNS = 100
LEFT_COLUMNS = 28  # of flags; a longer one has a line of its own

_Private = Any  # contexts and parameters of Typer, of which it tells no class
_Row = tuple[str, str]


class SftCommand(TyperCommand):
    """A command whose help is this program's own screen."""

    def format_help(self, ctx: _Private, formatter: _Private) -> None:  # noqa: ARG002
        """Print the screen."""
        text, _, examples = (self.help or "").partition("Examples:")
        parameters = self.get_params(ctx)
        arguments = [parameter for parameter in parameters if not _is_option(parameter)]
        words = " ".join(_placed(parameter) for parameter in arguments)
        _show(
            f"{ctx.command_path} [OPTIONS] {words}".rstrip(), text, examples.split("\n"), _panels(parameters)
        )


class SftGroup(TyperGroup):
    """The program itself: its commands by what a person wants."""

    def format_help(self, ctx: _Private, formatter: _Private) -> None:  # noqa: ARG002
        """Print the screen."""
        panels = {
            panel: [(name, _first_line(self.commands[name].help)) for name in names]
            for panel, names in COMMANDS.items()
        }
        panels |= _panels(self.get_params(ctx))
        _show(
            f"{ctx.command_path} COMMAND [OPTIONS]", self.help or "", (self.epilog or "").split("\n"), panels
        )


def _panels(parameters: Sequence[_Private]) -> dict[str, list[_Row]]:
    """Return the rows of each panel in order; ``--help`` stands last."""
    found: dict[str, list[_Row]] = {}
    for parameter in parameters:
        panel = getattr(parameter, "rich_help_panel", None) or MAIN_PANEL
        found.setdefault(PANELS[-1] if "--help" in parameter.opts else panel, []).append(_row(parameter))
    return {panel: found[panel] for panel in sorted(found, key=PANELS.index)}


def _row(parameter: _Private) -> _Row:
    """Return how a parameter is typed, and what it means."""
    if not _is_option(parameter):
        return _metavar(parameter), _meaning(parameter)
    names = sorted(parameter.opts, key=len)
    short = [name for name in names if not name.startswith("--")]
    long = [name for name in reversed(names) if name.startswith("--")]
    left = ", ".join([*short, *long]) if short else f"    {', '.join(long)}"
    return f"{left} {_metavar(parameter)}".rstrip(), _meaning(parameter)


def _meaning(parameter: _Private) -> str:
    text: str = parameter.help or ""
    default = parameter.default
    if getattr(parameter, "show_default", False) and default not in (None, False, ""):
        text += f" Default: {getattr(default, 'value', default)}."
    return text


def _metavar(parameter: _Private) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    words = "|".join(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ""
    named: str = (
        re.sub(r"^\[(.*)\]$", r"\1", parameter.metavar or "")
        or words
        or (parameter.name or "").upper().replace("_", "-")
    )
    return named


def _placed(argument: _Private) -> str:
    """Return an argument as the line of usage has it: in brackets where it can be left out."""
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _is_option(parameter: _Private) -> bool:
    return bool(parameter.param_type_name == "option")


def _first_line(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def _show(usage: str, text: str, examples: Sequence[str], panels: Mapping[str, Sequence[_Row]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, MOST_COLUMNS)
    console.print(Text.assemble(("Usage: ", "bold"), usage), end="\n\n")
    for wrapped in Text(" ".join(text.split())).wrap(console, console.width):
        console.print(wrapped.plain.rstrip())
    console.print()
    lines = [line.strip() for line in examples if line.strip()]
    for line in lines:
        console.print(Text(f"  {line}", style="cyan"), soft_wrap=True)
    if lines:
        console.print()
    for number, (panel, rows) in enumerate(panels.items()):
        if number:
            console.print()
        console.print(Text(panel, style="bold"))
        for line in _lines(rows, console):
            console.print(line, no_wrap=True, crop=False)


def _lines(rows: Sequence[_Row], console: "Console") -> Iterator[Any]:
    """Yield the lines of a panel: flags at the left, what they mean beside them, or below where they are long."""
    from rich.text import Text

    for spelled, meaning in rows:
        beside = len(spelled) + 2 <= LEFT_COLUMNS
        if not beside:
            yield Text.assemble("  ", (spelled, "cyan"))
        wrapped = Text(meaning).wrap(console, console.width - LEFT_COLUMNS - 2)
        for number, line in enumerate(wrapped):
            head = spelled if beside and not number else ""
            yield Text.assemble("  ", (f"{head:{LEFT_COLUMNS}}", "cyan"), line.plain.rstrip())
