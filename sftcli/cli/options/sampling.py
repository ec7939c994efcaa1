"""The options of commands that generate text. Imports nothing but Typer, as ``options`` does."""

from enum import StrEnum
from typing import Annotated

import typer

SAMPLING_PANEL = "Sampling"


class PrecisionChoice(StrEnum):
    """Of matrix products."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


Precision = Annotated[
    PrecisionChoice | None,
    typer.Option("--precision", help="Of matrix products; fp32 answers as other programs do in float32."),
]

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Longest answer in tokens.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        min=0.0,
        max=5.0,
        help="0 always takes the most likely token.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        min=0.0,
        max=1.0,
        help="Sample from the smallest set of tokens with this probability.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="K",
        min=0,
        help="Sample from this many most likely tokens; 0 for all.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        min=0.0,
        max=1.0,
        help="Leave out tokens with less than this share of the most likely one's probability.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        min=0.1,
        max=10.0,
        help="Above 1 makes tokens less likely that are there already.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
StopText = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End the answer before this text. Repeatable.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
