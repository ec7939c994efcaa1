"""Every setting of a run: its name, meaning, range and default. The only place where a default is written down.

A section is passed whole to the part that needs it. Names carry their units. Fields that can hold a secret do not exist.
Rows and optimizer steps have modules of their own; the other sections are here.
"""

import re
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from sftcli.config.schema.section import Section, Text
from sftcli.paths import as_path

RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Attention(StrEnum):
    """What computes attention: that of torch (``sdpa``), the model's own code (``eager``), or kernels for CUDA."""

    AUTO = "auto"
    SDPA = "sdpa"
    EAGER = "eager"
    FLASH_2 = "flash_attention_2"
    FLASH_3 = "flash_attention_3"
    FLASH_4 = "flash_attention_4"
    FLEX = "flex_attention"

    @property
    def is_flash(self) -> bool:
        """Whether it is a flash kernel of a package of its own, which computes in 16 bits alone."""
        return self.value.startswith("flash_")

    @property
    def needs_cuda(self) -> bool:
        """Whether it trains on CUDA devices alone."""
        return self.is_flash or self is Attention.FLEX


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
        description="Folder or hub name of the tokenizer of a .pt model; unset uses `gpt2`. Other models have their own.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the code of a hub model; command line only, and `revision` must be a full commit.",
    )

    attention: Attention = Field(
        Attention.AUTO,
        description="auto is sdpa where the model knows it, else eager, and keeps packed rows apart with kernels of its own. "
        "A named one is used as it is, or refused.",
    )

    new_tokens: tuple[Text, ...] = Field(
        (),
        description="Tokens to add to the tokenizer, such as a tag of your rows; each starts as the mean of all others and is "
        "trained, with an adapter too.",
        json_schema_extra={"allowed": 'a list of texts, such as ["<tool>"]'},
    )

    @model_validator(mode="after")
    def _new_tokens_can_be_added(self) -> Self:
        if len({*self.new_tokens}) < len(self.new_tokens):
            raise ValueError("new_tokens names a token twice")
        if any(text != text.strip() for text in self.new_tokens):
            raise ValueError("a token of new_tokens begins or ends in white space")
        if self.new_tokens and self.trust_remote_code:
            raise ValueError("new_tokens needs a model whose class transformers knows: not trust_remote_code")
        return self

    @model_validator(mode="after")
    def _trusted_code_is_pinned(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "trust_remote_code needs revision to be a full commit of 40 hex digits, whose code you have read"
            )
        return self


class CheckpointSettings(Section):
    """When the full state is saved, and which checkpoints are kept."""

    every_steps: int = Field(2000, ge=0, description="Steps between checkpoints; 0 saves by time alone.")
    every_minutes: float = Field(
        10.0, ge=0, description="Also save when the last checkpoint is this many minutes old; 0 for never."
    )
    keep_last: int = Field(
        2, ge=1, description="Number of newest checkpoints to keep; older ones are deleted."
    )
    in_background: bool = Field(
        True, description="Write checkpoints while training continues; needs memory for a copy of the state."
    )
    keep_best: bool = Field(
        True,
        description="Also keep the best checkpoint (`training.metric_for_best`), if that step was saved.",
    )
    keep_every_steps: int = Field(
        0, ge=0, description="Keep every checkpoint at a multiple of this many steps; 0 for none."
    )


class SamplingSettings(Section):
    """How answers are generated."""

    max_new_tokens: int = Field(256, ge=1, le=1_000_000, description="Maximum answer length in tokens.")
    temperature: float = Field(0.0, ge=0, le=5, description="0 always takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set with this probability.")
    top_k: int = Field(0, ge=0, description="Sample from this many most likely tokens; 0 for all.")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Drop tokens with less than this share of the most likely token's probability.",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.1,
        le=10,
        description="Above 1 makes tokens already in the prompt or answer less likely.",
    )
    stop: tuple[Text, ...] = Field(
        (), examples=["###"], description="Stop strings, which end an answer and are not part of it."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Sampling seed.")


class Tracker(StrEnum):
    """Trackers that can receive the metrics of a run."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


class Server(StrEnum):
    """Programs that answer with a model, as people call them."""

    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"
    OLLAMA = "ollama"


class RunSettings(Section):
    """Where a run is stored, and the trackers that receive its metrics."""

    root: str = Field("runs", min_length=1, description="Folder with the run folders.")
    name: str | None = Field(
        None,
        pattern=RUN_NAME_PATTERN,
        description="Name of the run; unset makes one from preset and time.",
        json_schema_extra={
            "allowed": "at most 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
        },
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="What an hour of the machine costs, in any currency: plans and outcomes then state a price.",
    )
    served_by: Server | None = Field(
        None,
        description="The program that is to serve the model: what it refuses is said before the training. Unset asks for nothing.",
    )
    trackers: tuple[Tracker, ...] = Field(
        (),
        description="Trackers to send losses and settings to: tensorboard, wandb, mlflow.",
        json_schema_extra={"allowed": "a list of tensorboard, wandb and mlflow"},
    )

    @field_validator("root")
    @classmethod
    def _at_home(cls, root: str) -> str:
        """Let ``~`` be what it is in a shell, which replaces it only where a word begins."""
        path = as_path(root)
        return str(path) if root.startswith("~") else root
