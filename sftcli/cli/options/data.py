"""The options that say how rows are read and which are good enough, with their help texts."""

from typing import Annotated

import typer

from sftcli.cli.options.shared import INPUT_PANEL, one_of_setting

Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="OURS=THEIRS",
        help="Read a column under another name, as in `--map prompt=question`. Repeatable.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="KEY",
        help="Drop a key that is refused because it changes what rows mean, as in `--ignore history`. Repeatable.",
        rich_help_panel=INPUT_PANEL,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Chat template: chatml, alpaca, modern-llm or a file of Jinja text; the tokenizer's own without it.",
        rich_help_panel=INPUT_PANEL,
    ),
]
TrainOn = Annotated[
    str | None,
    typer.Option(
        "--train-on",
        metavar="all|last",
        callback=one_of_setting("data.train_on"),
        help="Train all assistant turns of a conversation, or the last one only.",
        rich_help_panel=INPUT_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        metavar="N",
        min=8,
        help="Longest row in tokens; longer ones are left out and counted.",
        rich_help_panel=INPUT_PANEL,
    ),
]
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
        callback=one_of_setting("data.overlong"),
        help="What to do with longer rows: leave them out, cut them to the turns that fit, or stop.",
        rich_help_panel=INPUT_PANEL,
    ),
]
