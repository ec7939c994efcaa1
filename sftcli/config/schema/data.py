"""The settings of the rows: where they come from and how they are rendered."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from sftcli.config.schema.section import Section, Text

CHECKS = frozenset(  # settings that say which rows are good enough, and change none
    {
        "strict",
        "max_rejected_fraction",
        "max_cut_fraction",
        "max_duplicate_fraction",
        "max_near_duplicate_fraction",
        "max_trouble_fraction",
    }
)


class TrainOn(StrEnum):
    """Which assistant turns of a conversation are trained."""

    ALL = "all"
    LAST = "last"
    EACH = "each"  # all, each in an example of its own that ends with it


class Thinking(StrEnum):
    """What becomes of the thinking that comes before an answer."""

    TRAIN = "train"
    KEEP = "keep"  # in the context, without loss
    DROP = "drop"


class RowOrder(StrEnum):
    """In which order an epoch goes through the rows."""

    SHUFFLED = "shuffled"
    LENGTH = "length"
    SCORE = "score"


class Overlong(StrEnum):
    """What happens to a row with more than ``max_tokens`` tokens."""

    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


class Author(StrEnum):
    """Whose turn a content stands in."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class DataSettings(Section):
    """Which rows are trained on and how they are rendered."""

    sources: tuple[Text, ...] = Field(
        (),
        description="Files, folders or hub names, each NAME[:ROWS][@split][#config]; ROWS is 5000, 25%, x3 or 5000x3.",
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
    text_fraction: float = Field(
        0.0, ge=0, le=0.2, description="Share of the steps that are taken on plain text, evenly spread."
    )
    renames: tuple[Text, ...] = Field(
        (), description="Columns of other names, each OURS=THEIRS, such as prompt=question."
    )
    ignored_keys: tuple[Text, ...] = Field(
        (),
        description="Keys of rows and turns that are dropped although they change what a row means, such as history; else such "
        "rows are refused.",
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="Chat template: chatml, alpaca, modern-llm or a file of Jinja text; unset takes the tokenizer's own.",
    )
    control_tokens_from: tuple[Author, ...] = Field(
        (),
        description="Roles whose contents may write control tokens of the model: system, user, assistant, tool. The text of a "
        "control token in any other content stays text.",
        json_schema_extra={"allowed": "a list of system, user, assistant and tool"},
    )
    allow_control_text: bool = Field(
        False,
        description="Whether running text may hold chat markup and control tokens of the model; they are trained as letters.",
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
    template_variables: tuple[Text, ...] = Field(
        (), description="Variables of the chat template, each NAME=VALUE, such as enable_thinking=false."
    )
    thinking: Thinking = Field(
        Thinking.TRAIN,
        description="Whether thinking before an answer has loss (train), stands in the context without loss (keep), or is left "
        "out (drop).",
    )
    train_on: TrainOn = Field(
        TrainOn.ALL,
        description="Which assistant turns have loss: all of them, the last, or all, each in an example of its own (each).",
    )
    order: RowOrder = Field(
        RowOrder.SHUFFLED,
        description="Order of the rows in each epoch: shuffled, or a curriculum from the shortest row (length) or the lowest "
        "value of `score_column` (score) on.",
    )
    score_column: str | None = Field(
        None,
        min_length=1,
        description="Column with a number that says how hard a row is, for the order `score`.",
    )
    strict: bool = Field(
        False,
        description="Whether to fail on rows that are rejected, cut, repeated or broken, and on prompts that are both held "
        "out and trained on.",
    )
    max_rejected_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Most rows that may be rejected, also for their length; unset is a tenth, for other reasons, and none with `strict`.",
    )
    max_cut_fraction: float | None = Field(
        None, ge=0, le=1, description="Most kept rows that may be cut; unset is any, and none with `strict`."
    )
    max_duplicate_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Most kept rows that may repeat an earlier one; unset is any, and none with `strict`.",
    )
    max_near_duplicate_fraction: float | None = Field(
        None, ge=0, le=1, description="Most kept rows that may nearly repeat an earlier one; unset is any."
    )
    max_trouble_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Most kept rows that may have encoding trouble; unset is any, and none with `strict`.",
    )

    @model_validator(mode="after")
    def _score_is_used(self) -> Self:
        if (self.order is RowOrder.SCORE) != (self.score_column is not None):
            found = f'"{self.score_column}"' if self.score_column else "unset"
            raise ValueError(
                f"score_column is {found} and order is {self.order}; each of them needs the other"
            )
        return self
