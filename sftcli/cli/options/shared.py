"""The options that commands share and that set no setting, and the choice of a view.

Imports nothing heavier than Typer, because it is read before every command, ``--help`` and shell completion included.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options.flags import FLAGS, MODEL_PANEL, RUN_PANEL

OUTPUT_PANEL = "Output"

MIN_LIVE_COLUMNS = 40


class OutputMode(StrEnum):
    """How a command talks while it works."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    JSON = "json"
    QUIET = "quiet"
    EVENTS = "events"


class LogFormat(StrEnum):
    """What progress on stderr is written as where a person does not read it."""

    JSONL = "jsonl"


class Color(StrEnum):
    """When output is colored."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the user said about output, as one value."""

    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print exactly one JSON object, also on failure.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print nothing but results, warnings and errors.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print a line for every step.", rich_help_panel=OUTPUT_PANEL),
    ] = False
    log_format: Annotated[
        LogFormat | None,
        typer.Option(
            "--log-format",
            help="`jsonl` writes every event to stderr as a line of JSON, for other programs.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None
    color: Annotated[
        Color,
        typer.Option(
            "--color",
            help="When to use color. NO_COLOR and FORCE_COLOR are respected.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = Color.AUTO


RunsRoot = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", help="Folder with the run folders.", rich_help_panel=RUN_PANEL),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        help="Split the rows across this many processes on this machine; numbers do not depend on it.",
        rich_help_panel=RUN_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """How a model that is there already is opened."""

    tokenizer: Annotated[str | None, FLAGS["--tokenizer"].option] = None
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="MODEL",
            help="Base model of an adapter, if it is not where the adapter says.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    trusts_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the model code that the run was trained with; it must be unchanged.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False


def choose_output(
    output: Output, *, is_terminal: bool, columns: int, environment: Mapping[str, str] | None = None
) -> OutputMode:
    """Return the view for a command: live only where a person watches a terminal that can redraw.

    Color variables have no say, so that ``FORCE_COLOR`` in a CI job does not fill its log with bars.

    Args:
        output: What the user asked for.
        is_terminal: Whether stderr, where progress goes, is a terminal.
        columns: Width of that terminal.
        environment: Stands in for ``os.environ``.
    """
    env = os.environ if environment is None else environment
    if output.log_format is LogFormat.JSONL:
        return OutputMode.EVENTS
    if output.json:
        return OutputMode.JSON
    if output.quiet:
        return OutputMode.QUIET
    can_redraw = (
        is_terminal
        and not env.get("CI")
        and env.get("TERM", "") not in {"dumb", "unknown"}
        and env.get("TTY_INTERACTIVE") != "0"
        and columns >= MIN_LIVE_COLUMNS
    )
    return OutputMode.RICH if can_redraw and not output.verbose else OutputMode.PLAIN


def use_color(color: Color, *, is_terminal: bool, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether to color a stream: the flag, then NO_COLOR, then FORCE_COLOR, then whether it is a terminal."""
    env = os.environ if environment is None else environment
    if color is not Color.AUTO:
        return color is Color.ALWAYS
    if env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR"):
        return True
    return is_terminal and env.get("TERM", "") not in {"dumb", "unknown"}
