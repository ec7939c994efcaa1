"""The options that say which rows are good enough, with their help texts."""

from typing import Annotated

import typer

from sftcli.cli.options import INPUT_PANEL

AllowLeak = Annotated[
    bool,
    typer.Option(
        "--allow-leak",
        help="Go on although held-out rows are trained on too.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Exit with 3 if rows are rejected, cut, repeated or broken, or share prompts with held-out ones.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Overlong = Annotated[
    str | None,
    typer.Option(
        "--overlong",
        metavar="drop|truncate|error",
        help="What to do with longer rows: leave them out, cut them to the turns that fit, or stop.",
        rich_help_panel=INPUT_PANEL,
    ),
]
