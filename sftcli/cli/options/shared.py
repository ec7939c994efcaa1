"""The options that commands share, each with its help text, and the choice of a view.

Imports nothing heavier than Typer, because it is read before every command, ``--help`` and shell completion included.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete


def one_of_setting(key: str) -> Callable[[object], object]:
    """Return a callback that checks words of a flag against the setting ``key``, together with the other flags.

    The settings would refuse them too, but only after the flags that Typer checks.
    """

    def check(value: object) -> object:
        if value:
            from sftcli.config.fields import choices, element_choices
            from sftcli.config.schema.settings import FIELDS

            words = choices(FIELDS[key]) or element_choices(FIELDS[key])
            for word in value if isinstance(value, list) else [value]:
                if word not in words:
                    raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, words))}")
        return value

    return check


SETTINGS_PANEL = "Settings"
INPUT_PANEL = "Model and data"
RUN_PANEL = "Run"
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

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: Color = Color.AUTO
    log_format: LogFormat | None = None


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        metavar="NAME",
        autocompletion=complete.presets,
        help="Start from the settings of this preset; `sft presets` lists them.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        autocompletion=complete.config_files,
        help="Read settings from this TOML file.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=complete.settings,
        help="Change one setting, as in `--set training.learning_rate=1e-4`. Repeatable.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
MaxSteps = Annotated[
    int | None,
    typer.Option(
        "--max-steps", metavar="N", min=1, help="Optimizer steps to train.", rich_help_panel=SETTINGS_PANEL
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**32 - 1,
        help="Seed of everything random.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE",
        autocompletion=complete.rows,
        help="File, folder or hub name of rows to use; SOURCE:N takes N rows. Repeatable.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Heldout = Annotated[
    list[str] | None,
    typer.Option(
        "--heldout",
        metavar="SOURCE",
        autocompletion=complete.rows,
        help="Rows to hold out; without it, a share of the data is. Repeatable.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Packing = Annotated[
    str | None,
    typer.Option(
        "--packing",
        metavar="auto|on|off",
        callback=one_of_setting("training.packing"),
        help="Put several rows into one, kept apart by attention; auto does where the model is seen to keep them apart.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=complete.models,
        help="Alias, hub name, folder, .gguf or .pt file of a model.",
        rich_help_panel=INPUT_PANEL,
    ),
]
_TRUST_HELP = "Run the code that a hub model brings, at the full commit in model.revision. Read it first."
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help=_TRUST_HELP, rich_help_panel=INPUT_PANEL)
]
TrustRunCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that the run was trained with; it must be the same still.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="Tokenizer of a .pt model, which holds none; gpt2 by default.",
        rich_help_panel=INPUT_PANEL,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        help="The model that an adapter belongs to, where it is not where the adapter says.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="PATH",
        autocompletion=complete.models,
        help="Checkpoint, run folder or model folder to use; without it, the newest run.",
        rich_help_panel=INPUT_PANEL,
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="NAME",
        help="Name of the run folder; without it, one is made from preset and time.",
        rich_help_panel=RUN_PANEL,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        callback=one_of_setting("run.trackers"),
        help="Send the numbers of the run to tensorboard, wandb or mlflow too. Repeatable.",
        rich_help_panel=RUN_PANEL,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        help="Share each step among so many processes on this machine, one for each GPU.",
        rich_help_panel=RUN_PANEL,
    ),
]
EvalProcesses = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        help="Share the rows among so many processes on this machine; numbers do not depend on it.",
        rich_help_panel=RUN_PANEL,
    ),
]
RunsRoot = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", help="Folder that holds run folders.", rich_help_panel=RUN_PANEL),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print exactly one JSON object, also on failure.", rich_help_panel=OUTPUT_PANEL
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but results, warnings and errors.", rich_help_panel=OUTPUT_PANEL
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print a line for every step.", rich_help_panel=OUTPUT_PANEL),
]
LogFormatChoice = Annotated[
    LogFormat | None,
    typer.Option(
        "--log-format",
        help="`jsonl` writes every event to stderr as a line of JSON, for a program that watches.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
ColorChoice = Annotated[
    Color,
    typer.Option(
        "--color",
        help="When to use color. NO_COLOR and FORCE_COLOR are respected.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


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
