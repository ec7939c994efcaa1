"""The settings of the optimizer's steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from sftcli.config.schema.section import Section, Text
from sftcli.errors import UsageError


class Precision(StrEnum):
    """What the matrix products run in. Weights, optimizer and gradient sums are float32 in any case."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"  # with loss scaling
    FP32 = "fp32"


class Schedule(StrEnum):
    """How the learning rate moves after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    WSD = "wsd"  # warm-up, stable, decay


class OptimizerName(StrEnum):
    """How gradients become updates. The 8-bit ones need the extra ``8bit``, the paged one a CUDA device too."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    ADAMW_LEAN = "adamw_lean"  # moments of 8 bits, and no copy of the weights beside their masters
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    MUON = "muon"  # AdamW for embeddings, head, gains and biases


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerFacts:
    """What is known of an optimizer before it is made; how it is made, ``make_optimizer`` knows.

    ``state_share`` is what it keeps, in parts of the float32 size of what trains, and a little more.
    """

    state_share: float
    has_adamw_moments: bool = False  # two float32 tensors in the shape of each weight
    takes_shards: bool = False  # updates weights that processes share out, as one process would
    splits_masters: bool = False  # takes masters that are kept in two halves (``SplitWeights``)
    needs_bitsandbytes: bool = False
    needs_cuda: bool = False


OPTIMIZERS: Mapping[OptimizerName, OptimizerFacts] = {
    OptimizerName.ADAMW: OptimizerFacts(state_share=2.0, has_adamw_moments=True, takes_shards=True),
    OptimizerName.ADAFACTOR: OptimizerFacts(state_share=0.1, takes_shards=True),  # means of rows and columns
    OptimizerName.ADAMW_LEAN: OptimizerFacts(  # two bytes and their scales
        state_share=0.51, splits_masters=True, takes_shards=True
    ),
    # The same, except for tensors of less than 4096 numbers. Its blocks run through a whole tensor, and across shards.
    OptimizerName.ADAMW_8BIT: OptimizerFacts(state_share=0.6, needs_bitsandbytes=True),
    OptimizerName.MUON: OptimizerFacts(  # one moment of matrices, two of embeddings and head
        state_share=1.5, takes_shards=True
    ),
    OptimizerName.PAGED_ADAMW_8BIT: OptimizerFacts(state_share=0.6, needs_bitsandbytes=True, needs_cuda=True),
}


class Loss(StrEnum):
    """What training minimizes, summed over response tokens. Held-out loss is always ``nll``."""

    NLL = "nll"  # negative log-likelihood
    DFT = "dft"  # times the probability of the token: dynamic fine-tuning


class PackRows(StrEnum):
    """Whether several rows share one row of the model's input."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Compile(StrEnum):
    """Whether torch compiles the decoder layers."""

    OFF = "off"
    AUTO = "auto"  # where it was measured to be faster, which is nowhere yet
    ON = "on"


class Checkpointing(StrEnum):
    """What layers keep for the backward pass, from most to least; what they do not keep is computed again there."""

    OFF = "false"  # all
    SELECTIVE = "selective"  # attention and its projections
    LAYERS = "true"  # their input
    OFFLOAD = "offload"  # their input, in the memory of the host

    @property
    def is_on(self) -> bool:
        """Whether something is computed again."""
        return self is not Checkpointing.OFF


class OnSpike(StrEnum):
    """What happens when the loss jumps far above what it was and stays there."""

    WARN = "warn"
    STOP = "stop"


class Parallel(StrEnum):
    """How several processes share the work."""

    AUTO = "auto"
    DDP = "ddp"  # each holds the whole model
    FSDP = "fsdp"  # each holds a part of it
    HSDP = "hsdp"  # those of one machine share it out, and each machine has all of it


class BestBy(StrEnum):
    """What says which of two checkpoints is better."""

    LOSS = "loss"  # held-out loss, the lower one
    CHECK = "check"  # the score of held-out answers by the check that knows the task, the higher one


CHEAP_ANSWERS, SURE_ANSWERS = 8, 50  # held-out prompts that are answered: to look at, and to decide by


class TrainingSettings(Section):
    """How the weights are updated. What is unset follows from the rows and the model (docs/recipes.md)."""

    max_steps: int = Field(0, ge=0, description="Optimizer steps; 0 trains for `epochs`.")
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the rows when `max_steps` is 0; unset follows from the number of rows.",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes that the whole training may take, start and saving included: its steps are measured, counted once at the "
        "start and recorded as `max_steps`. With `max_steps` or `epochs` the fewer steps count.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows in the global batch of one optimizer step; unset follows from the number of rows.",
    )
    micro_batch_size: int = Field(
        8, ge=1, description="Maximum rows in a micro-batch; a global batch is split into micro-batches."
    )
    packing: PackRows = Field(
        PackRows.AUTO,
        description="Whether to pack several rows into one input row, isolated from each other; auto packs if the "
        "model keeps them apart at no cost.",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum tokens in a micro-batch of packed rows, or one row; unset is `micro_batch_size` times the longest row.",
    )
    loss: Loss = Field(
        Loss.NLL,
        description="nll, or dft (dynamic fine-tuning, Wu et al. 2025): each token's loss times its probability, so that unlikely "
        "tokens weigh less. Losses are shown and held-out loss is measured as nll in either case.",
    )
    router_aux_loss: float = Field(
        0.0,
        ge=0,
        description="Coefficient of the load-balancing loss of routed experts, over all tokens of a step (0.001 to 0.02 is usual); "
        "0 for none.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate; unset follows from the size of the model, and is 2e-4 for adapters.",
    )
    schedule: Schedule = Field(
        Schedule.COSINE,
        description="Learning rate after warm-up: cosine, linear, constant, or wsd (constant, "
        "then decay over the last `decay_fraction`).",
    )
    min_learning_rate_fraction: float = Field(
        0.0, ge=0, le=1, description="Final learning rate as a share of the peak."
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of `max_steps` over which wsd decays.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; unset is `warmup_fraction` of `max_steps`."
    )
    warmup_fraction: float = Field(
        0.03, ge=0, le=1, description="Share of `max_steps` spent in warm-up when `warmup_steps` is unset."
    )
    optimizer: OptimizerName = Field(
        OptimizerName.ADAMW,
        description="adamw; muon for the matrices of the layers; or one with less state: adamw_lean (10 bytes a weight "
        "with weight and gradient, where adamw has 18), adafactor, adamw_8bit, paged_adamw_8bit.",
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay, on matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    train_embeddings: bool = Field(
        True,
        description="Whether token embeddings and the output head are trained. If frozen, steps are faster and tokens that "
        "the rows never use stay unchanged.",
    )
    train: tuple[Text, ...] = Field(
        (),
        description="Train these weights of the model alone: parts of names such as `layers.20-`, `*.mlp.*` or `lm_head`; "
        "unset trains all.",
        json_schema_extra={"allowed": 'a list of parts of names, such as ["layers.20-"]'},
    )
    freeze: tuple[Text, ...] = Field(
        (),
        description="Leave these weights as they are, also those that `train` names: parts of names such as `layers.0-3`.",
        json_schema_extra={"allowed": 'a list of parts of names, such as ["layers.0-3"]'},
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 leaves them as they are."
    )
    release_gradients: bool = Field(
        False,
        description="Update each weight in the backward pass and free its gradient, in steps of one micro-batch: less memory, the same "
        "updates. With `max_grad_norm` the pass is computed twice, for the norm and for the updates; with `max_grad_norm` 0 once.",
    )
    precision: Precision = Field(
        Precision.AUTO,
        description="bf16, fp16 (with loss scaling) or fp32 matrix products; auto picks the faster of bf16 and fp32, bf16 if about even, "
        "and fp16 on GPUs that have matrix units for it alone (V100, T4); a resumed run keeps its choice.",
    )
    tf32: bool = Field(
        False,
        description="On CUDA, whether float32 products round their factors to 10 bits (TF32), which is faster; "
        "false keeps them exact.",
    )
    deterministic: bool = Field(
        True,
        description="On CUDA, whether to use only kernels that give the same bits each time, so that a resumed run ends as one that never "
        "stopped; false may be faster. A CPU does in any case.",
    )
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        description="Strength of NEFTune noise on embeddings (5 is usual); 0 for none.",
    )
    gradient_checkpointing: Checkpointing = Field(
        Checkpointing.OFF,
        description="Keep less for the backward pass and compute the rest again: selective keeps attention and its projections, true "
        "only each layer's input (about a third more time), offload that input in the memory of the host, for a GPU.",
    )
    compile: Compile = Field(
        Compile.AUTO,
        description="Whether torch compiles each decoder layer, which takes minutes at the start, needs a C++ compiler and moves losses "
        "by rounding; auto is off until it has been measured on a GPU.",
    )
    max_bad_steps: int = Field(
        3,
        ge=1,
        description="End the run after this many non-finite steps in a row; each is skipped before the update.",
    )
    on_spike: OnSpike = Field(
        OnSpike.WARN,
        description="A loss spike is reported with its rows; stop also saves and ends the run if the loss is "
        "still high after five steps.",
    )
    log_every_steps: int = Field(10, ge=1, description="Steps between lines in `training.log`.")
    eval_every_steps: int = Field(
        200,
        ge=0,
        description="Steps between held-out evaluations; 0 evaluates only before and after training.",
    )
    eval_answers: int | None = Field(
        None,
        ge=0,
        description="Held-out prompts that are answered and graded at each evaluation; 0 for none. Unset is 8 where that takes "
        "at most 5 % of the training's time, else 0; and 50 where `metric_for_best` is check.",
    )
    metric_for_best: BestBy = Field(
        BestBy.LOSS,
        description="What makes a checkpoint the best, and ends a run early: the lowest held-out loss, or the highest score of held-out "
        "answers by the check that fits them (check); the lower loss decides between equals.",
    )
    early_stopping_evals: int = Field(
        0,
        ge=0,
        description="Stop after this many evaluations in a row without a better `metric_for_best` and make the best checkpoint "
        "the final model; 0 trains to the end and keeps the last step.",
    )
    early_stopping_improvement: float = Field(
        0.001, ge=0, description="Nats per token by which held-out loss must fall to count as lower."
    )
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine that share each step; torchrun and srun set it themselves.",
    )
    context_processes: int = Field(
        1,
        ge=1,
        description="Neighboring processes that share each row, for rows that do not fit on one device; it divides the number of "
        "processes and of attention heads.",
    )
    parallel: Parallel = Field(
        Parallel.AUTO,
        description="How processes share the work: ddp (full replica), fsdp (sharded) or hsdp (sharded inside each machine, replicas "
        "across machines); auto picks one that shards if a replica does not fit on the device: hsdp if a shard of one machine does.",
    )
    shard_processes: int = Field(
        0,
        ge=0,
        description="Processes that hold one replica together in hsdp, consecutive ranks; 0 for those of one machine.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the row order, the split and dropout.")

    def for_rows(self, num_rows: int, *, text_fraction: float = 0.0) -> Self:
        """Return these settings with ``max_steps`` filled in for that many training rows, and as much text between them.

        Raises:
            UsageError: There are fewer steps than ``warmup_steps``.
        """
        if self.max_steps:
            return self
        assert self.epochs is not None
        steps = max(1, math.ceil(self.epochs * num_rows / self.rows_per_step / (1 - text_fraction)))
        if self.max_minutes is None:
            self._require_warmup_within(steps, f"{self.epochs:g} epochs of {num_rows} rows")
        return self.model_copy(update={"max_steps": steps})

    def ending_at(self, steps: int) -> Self:
        """Return these settings with ``max_minutes`` turned into ``steps``.

        Raises:
            UsageError: They are fewer than ``warmup_steps``.
        """
        self._require_warmup_within(steps, f"{self.max_minutes or 0:g} minutes")
        return self.model_copy(update={"max_steps": steps, "max_minutes": None})

    def _require_warmup_within(self, steps: int, what: str) -> None:
        if self.warmup_steps is not None and self.warmup_steps > steps:
            raise UsageError(
                f"training.warmup_steps is {self.warmup_steps}, but {what} are {steps} steps",
                hint="lower training.warmup_steps, or use training.warmup_fraction",
            )

    @property
    def rows_per_step(self) -> int:
        """``batch_size``, once it is decided."""
        assert self.batch_size is not None
        return self.batch_size

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _in_words(cls, value: object) -> object:
        """Take true and false of TOML and JSON for the words."""
        return str(value).lower() if isinstance(value, bool) else value

    @property
    def clips_to(self) -> float:
        """``max_grad_norm``, infinity where gradients are not clipped."""
        return self.max_grad_norm or math.inf

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate``, once it is decided."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def num_answers(self) -> int:
        """``eval_answers``, where it is unset as many as there are if that is not too slow."""
        unset = SURE_ANSWERS if self.metric_for_best is BestBy.CHECK else CHEAP_ANSWERS
        return unset if self.eval_answers is None else self.eval_answers

    @property
    def answers_if_cheap(self) -> bool:
        """Whether nobody asks for answers, so that they are given where they take little time."""
        return self.eval_answers is None and self.metric_for_best is BestBy.LOSS

    @property
    def minimizes_more(self) -> bool:
        """Whether what is minimized is not the negative log-likelihood alone."""
        return self.loss is not Loss.NLL or self.router_aux_loss > 0

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up that apply; ``max_steps`` must be known."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.max_steps * self.warmup_fraction)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) is larger than batch_size ({self.batch_size})"
            )
        if self.early_stopping_evals and not self.eval_every_steps:
            raise ValueError(
                f"early_stopping_evals ({self.early_stopping_evals}) needs evaluations: eval_every_steps is 0"
            )
        if self.metric_for_best is BestBy.CHECK and not self.num_answers:
            raise ValueError("metric_for_best (check) grades answers: eval_answers is 0")
        if self.max_steps and self.num_warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.num_warmup_steps}) is more than max_steps ({self.max_steps})"
            )
        return self
