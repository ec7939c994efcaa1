"""The settings of the rows: where they come from and how they are rendered."""

from enum import StrEnum

from pydantic import Field

from sftcli.config.section import Section, Text


class TrainOn(StrEnum):
    """Which assistant turns of a conversation are trained."""

    ALL = "all"
    LAST = "last"


class Overlong(StrEnum):
    """What happens to a row with more than ``max_tokens`` tokens."""

    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


class DataSettings(Section):
    """Which rows are trained on and how they are rendered."""

    sources: tuple[Text, ...] = Field(
        (), description="Files, folders or hub names, each NAME[:ROWS][@split][#config]."
    )
    heldout_sources: tuple[Text, ...] = Field(
        (), description="Sources of the held-out rows; empty takes a share of `sources`."
    )
    heldout_fraction: float = Field(
        0.02, ge=0, le=0.5, description="Share of rows held out when there are no held-out sources."
    )
    heldout_max_rows: int = Field(
        512, ge=1, description="Most rows that are held out when there are no held-out sources."
    )
    text_sources: tuple[Text, ...] = Field(
        (), description="Sources of plain text, rows with a column `text`, mixed into training."
    )
    text_fraction: float = Field(0.0, ge=0, le=0.2, description="Share of plain text in training.")
    renames: tuple[Text, ...] = Field(
        (), description="Columns of other names, each OURS=THEIRS, such as prompt=question."
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="Chat template: chatml, alpaca, modern-llm or a file of Jinja text; unset takes the tokenizer's own.",
    )
    allow_leak: bool = Field(
        False, description="Whether held-out sources may hold rows that are trained on too."
    )
    max_tokens: int = Field(
        512,
        ge=8,
        description="Longest row in tokens, prompt included; `overlong` says what becomes of longer ones.",
    )
    overlong: Overlong = Field(
        Overlong.DROP,
        description="Longer rows are dropped, truncated to the turns that fit or to the start of an answer, or an error.",
    )
    train_on: TrainOn = Field(
        TrainOn.ALL, description="Which assistant turns have loss: all of them, or the last."
    )
