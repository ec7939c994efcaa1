"""Every setting of a run: its name, meaning, range and default. The only place where a default is written down.

A section is passed whole to the part that needs it. Names carry their units. Fields that can hold a secret do not exist.
"""

import math
import re
from enum import StrEnum
from typing import Annotated, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sftcli.errors import UsageError

Text = Annotated[str, Field(min_length=1)]

RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Precision(StrEnum):
    """What the matrix products run in. Weights, optimizer and gradient sums are float32 in either case."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Schedule(StrEnum):
    """How the learning rate moves after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class TrainOn(StrEnum):
    """Which assistant turns of a conversation are trained."""

    ALL = "all"
    LAST = "last"


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _type_is_meant(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would convert: ``true`` for 1, ``"20"`` for 20, 1 for ``true``."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(annotation) or (annotation,)
        is_bool = isinstance(value, bool)
        if (bool in kinds and not is_bool and value is not None) or (
            (int in kinds or float in kinds) and (is_bool or isinstance(value, str))
        ):
            raise PydanticCustomError("wrong_type", "wrong type")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _holds_no_password(cls, value: object) -> object:
        """Refuse an address with a user name or password: settings are written to disk and shown."""
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and re.search(r"://[^/\s]*@", text) for text in texts):
            raise ValueError(
                "an address must not hold a user name or password; use `hf auth login` or HF_TOKEN"
            )
        return value


class ModelSettings(Section):
    """Which model is trained."""

    name: str = Field(
        "smollm2-135m",
        min_length=1,
        description="Alias, hub name, folder, .gguf or .pt file of the model to start from.",
    )
    revision: str | None = Field(None, min_length=1, description="Hub commit, tag or branch of the model.")
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="Folder or hub name of the tokenizer of a .pt model; unset takes `gpt2`. Others bring their own.",
    )


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
        512, ge=8, description="Longest row in tokens, prompt included; longer rows are dropped and counted."
    )
    train_on: TrainOn = Field(
        TrainOn.ALL, description="Which assistant turns have loss: all of them, or the last."
    )


class TrainingSettings(Section):
    """How the weights are updated. Numbers that are not said otherwise are those of the source recipe."""

    max_steps: int = Field(0, ge=0, description="Optimizer steps; 0 takes `epochs` passes over the rows.")
    epochs: float = Field(3.0, gt=0, description="Passes over the rows when `max_steps` is 0.")
    batch_size: int = Field(32, ge=1, description="Rows in the global batch of one optimizer step.")
    micro_batch_size: int = Field(
        8, ge=1, description="Most rows in one forward and backward pass; a global batch is cut into these."
    )
    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate.")
    schedule: Schedule = Field(
        Schedule.COSINE, description="How the learning rate goes to 0 after warm-up, or stays constant."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; unset takes `warmup_fraction` of `max_steps`."
    )
    warmup_fraction: float = Field(
        0.03, ge=0, le=1, description="Share of `max_steps` spent in warm-up when `warmup_steps` is unset."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay, on matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    train_embeddings: bool = Field(
        True,
        description="Whether token embeddings and the output head are trained. Frozen, steps are faster and tokens that "
        "the rows never use stay as they were.",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradients are scaled down to this norm where they exceed it."
    )
    precision: Precision = Field(
        Precision.AUTO,
        description="bf16 or fp32 matrix products; auto takes bf16 where the machine is fast at it.",
    )
    max_bad_steps: int = Field(
        3, ge=1, description="Non-finite steps in a row that end the run; each is skipped before the update."
    )
    log_every_steps: int = Field(10, ge=1, description="How often a line goes to `training.log`.")
    eval_every_steps: int = Field(
        200, ge=0, description="How often held-out loss is measured; 0 only before and after training."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the row order, the split and dropout.")

    def for_rows(self, num_rows: int) -> Self:
        """Return these settings with ``max_steps`` filled in for that many training rows.

        Raises:
            UsageError: There are fewer steps than ``warmup_steps``.
        """
        if self.max_steps:
            return self
        steps = max(1, math.ceil(self.epochs * num_rows / self.batch_size))
        if self.warmup_steps is not None and self.warmup_steps > steps:
            raise UsageError(
                f"training.warmup_steps is {self.warmup_steps}, but {self.epochs:g} epochs of {num_rows} rows are "
                f"{steps} steps",
                hint="lower training.warmup_steps, or use training.warmup_fraction",
            )
        return self.model_copy(update={"max_steps": steps})

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up that apply; ``max_steps`` must be known."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.max_steps * self.warmup_fraction)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) is larger than batch_size ({self.batch_size})"
            )
        if self.max_steps and self.num_warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.num_warmup_steps}) is more than max_steps ({self.max_steps})"
            )
        return self


class CheckpointSettings(Section):
    """When the full state is saved, and how much of it is kept."""

    every_steps: int = Field(2000, ge=0, description="How often a checkpoint is saved; 0 only at the end.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints that are kept; older ones are deleted.")
    in_background: bool = Field(
        True, description="Write checkpoints while training goes on; takes memory for a copy of the state."
    )
    keep_best: bool = Field(
        True, description="Keep the checkpoint with the lowest held-out loss as well, if that step was saved."
    )
    keep_every_steps: int = Field(
        0, ge=0, description="Checkpoints of every so many steps are never deleted; 0 for none."
    )


class SamplingSettings(Section):
    """How answers are generated."""

    max_new_tokens: int = Field(256, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(0.0, ge=0, le=5, description="0 always takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set with this probability.")
    top_k: int = Field(0, ge=0, description="Sample from this many most likely tokens; 0 for all.")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Leave out tokens with less than this share of the most likely one's probability.",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.1,
        le=10,
        description="Above 1 makes tokens less likely that the prompt or answer already holds.",
    )
    stop: tuple[Text, ...] = Field((), description="Texts that end an answer; they are not part of it.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampling.")


class RunSettings(Section):
    """Where a run is kept."""

    root: str = Field("runs", min_length=1, description="Folder that holds run folders.")
    name: str | None = Field(
        None,
        pattern=RUN_NAME_PATTERN,
        description="Name of the run; unset makes one from preset and time.",
        json_schema_extra={
            "allowed": "at most 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
        },
    )
