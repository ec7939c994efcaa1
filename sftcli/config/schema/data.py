"""The settings of the rows: where they come from and how they are rendered."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from sftcli.config.schema.section import Section, Text
from sftcli.figures import fraction_of

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

SUBSET = ("train_share", "share_seed", "leave_out")  # which of the prepared rows are trained on

# What rendering tells a chat template itself, so that no variable may have such a name.
RENDERING_NAMES = frozenset(("messages", "tools", "documents", "add_generation_prompt"))


class TrainOn(StrEnum):
    """Which assistant turns of a conversation are trained."""

    ALL = "all"
    LAST = "last"
    EACH = "each"  # all, each in an example of its own that ends with it


class FirstTurn(StrEnum):
    """What becomes of a conversation that the assistant begins."""

    REJECT = "reject"
    UNTRAINED = "untrained"  # its first turn stands in the context, without loss
    TRAINED = "trained"  # behind a prompt without a question


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


class Repeats(StrEnum):
    """What happens to a row that repeats another one of its split."""

    KEEP = "keep"
    DROP = "drop"  # all but one


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
        (), description="Sources of the held-out rows; empty holds out a share of `sources`."
    )
    heldout_fraction: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Share of rows held out when there are no held-out sources; unset follows from the number of rows.",
    )
    heldout_max_rows: int = Field(
        512, ge=1, description="Maximum number of rows held out when there are no held-out sources."
    )
    text_sources: tuple[Text, ...] = Field(
        (), description="Sources of pretraining text (rows with a column `text`) mixed into training."
    )
    text_fraction: float = Field(
        0.0, ge=0, le=0.2, description="Share of the steps on pretraining text, evenly spread."
    )
    replay: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="Share of the training rows that are replayed, such as 0.2 or 20%: drawn from what the run that made the "
        "model was trained on, and the runs before it.",
        json_schema_extra={"allowed": "a share such as 0.2 or 20%, at least 0 and at most 0.9"},
    )
    as_text: bool = Field(
        False,
        description="Whether sources of rows may hold pretraining text, all of it trained, without a warning.",
    )
    split_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Seed of the split into training and held-out rows, and of samples of sources; unset is `training.seed`.",
    )
    train_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training rows to train on; the rows of a smaller share are among those of a larger one. "
        "Held-out rows stay the same.",
    )
    share_seed: int = Field(0, ge=0, lt=2**32, description="Seed of the rows that `train_share` takes.")
    leave_out: tuple[Text, ...] = Field(
        (),
        description="Sources, as `sources` names them, that are not trained on; their held-out rows are still scored.",
    )
    renames: tuple[Text, ...] = Field(
        (),
        examples=["prompt=question"],
        description="Columns to rename, each OURS=THEIRS, such as prompt=question.",
    )
    ignored_keys: tuple[Text, ...] = Field(
        (),
        examples=["history"],
        description="Row and turn keys to drop although they change what a row means, such as history; otherwise such "
        "rows are refused.",
    )
    where: tuple[Text, ...] = Field(
        (),
        examples=["quality>=4"],
        description="Conditions that all rows must meet, each COLUMN OP VALUE with ==, !=, <, <=, >, >= or ~ (contains), such as "
        "quality>=4; other rows are left out and counted.",
    )
    fixes: str | None = Field(
        None,
        min_length=1,
        description="File of what was decided about rows, each by its hash: leave it out, replace its answer, keep it. "
        "The page that `sft report --rows` writes makes one.",
    )
    strip_stop_text: bool = Field(
        False,
        description="Whether to take away the text of a stop token, such as <|endoftext|>, that stands at the end of answers.",
    )
    duplicates: Repeats = Field(
        Repeats.KEEP,
        description="What to do with rows equal to another one of their split: keep them, or drop all but one, drawn with the seed.",
    )
    near_duplicates: Repeats = Field(
        Repeats.KEEP,
        description="What to do with rows nearly equal to another one of their split: keep or drop, as for `duplicates`.",
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="Chat template: chatml, alpaca, modern-llm or a file of Jinja text; unset uses the tokenizer's own.",
    )
    control_tokens_from: tuple[Author, ...] = Field(
        (),
        description="Roles whose content may contain control tokens of the model: system, user, assistant, tool. The text of a "
        "control token in any other content stays text.",
        json_schema_extra={"allowed": "a list of system, user, assistant and tool"},
    )
    allow_control_text: bool = Field(
        False,
        description="Whether pretraining text may contain chat markup and control tokens; they are trained as ordinary text.",
    )
    allow_leak: bool = Field(False, description="Whether held-out sources may contain training rows.")
    max_tokens: int = Field(
        512,
        ge=8,
        description="Maximum row length in tokens, prompt included; `overlong` handles longer rows.",
    )
    overlong: Overlong = Field(
        Overlong.DROP,
        description="What to do with longer rows: drop them, truncate them to the turns that fit (or part of an answer), or fail.",
    )
    template_variables: tuple[Text, ...] = Field(
        (),
        examples=["enable_thinking=false"],
        description="Variables of the chat template, each NAME=VALUE, such as enable_thinking=false.",
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
    first_turn: FirstTurn = Field(
        FirstTurn.REJECT,
        description="What to do with conversations that the assistant begins: reject them, keep that turn in the context without loss "
        "(untrained), or train it behind a prompt without a question (trained).",
    )
    order: RowOrder = Field(
        RowOrder.SHUFFLED,
        description="Row order in each epoch: shuffled, or a curriculum by increasing row length (length) or "
        "`score_column` (score).",
    )
    score_column: str | None = Field(
        None,
        min_length=1,
        description="Numeric column with the difficulty of each row, for the order `score`.",
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
        description="Largest share of rejected rows, overlong ones included; unset allows 10 % not counting overlong ones, none with `strict`.",
    )
    max_cut_fraction: float | None = Field(
        None, ge=0, le=1, description="Largest share of truncated rows; unset allows any, none with `strict`."
    )
    max_duplicate_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest share of exact duplicates; unset allows any, none with `strict`.",
    )
    max_near_duplicate_fraction: float | None = Field(
        None, ge=0, le=1, description="Largest share of near duplicates; unset allows any."
    )
    max_trouble_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest share of rows with encoding trouble; unset allows any, none with `strict`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _percent_is_a_share(cls, values: object) -> object:
        """Read ``20%`` as 0.2."""
        text = values.get("replay") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(text, str) or not text.strip().endswith("%"):
            return values
        return values | {"replay": fraction_of(text)}

    @property
    def takes_all(self) -> bool:
        """Whether all prepared rows are trained on that are not held out."""
        return self.train_share == 1 and not self.leave_out

    @model_validator(mode="after")
    def _left_out_is_there(self) -> Self:
        if unknown := [name for name in self.leave_out if name not in self.sources]:
            raise ValueError(f"leave_out names {unknown[0]}, which is not among sources")
        if self.sources and set(self.sources) <= set(self.leave_out):
            raise ValueError("leave_out names every one of sources")
        return self

    @model_validator(mode="after")
    def _score_is_used(self) -> Self:
        if (self.order is RowOrder.SCORE) != (self.score_column is not None):
            found = f'"{self.score_column}"' if self.score_column else "unset"
            raise ValueError(f"score_column is {found} and order is {self.order}; each needs the other")
        return self
