"""What a training would need, from a probe on the real model and rows. Trains nothing and writes no run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.auto import with_values
from sftcli.config.schema.settings import Settings
from sftcli.events import Notice, Session
from sftcli.modeling.config_values import config_value
from sftcli.modeling.formats.sizes import adapter_bytes, embedding_bytes
from sftcli.modeling.load import count_parameters
from sftcli.runtime import (
    choose_device,
    dtype_name,
    held_peak_bytes,
    memory_bytes,
    monotonic,
    reachable_memory_bytes,
)
from sftcli.services.machine.kernels import kernels_as_set
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Budget, Decisions
from sftcli.services.train.budget import (
    USUAL,
    Pace,
    count_steps,
    evaluations_of,
    other_end,
    price_of,
    save_seconds,
)
from sftcli.services.train.decisions import settle_precision
from sftcli.services.train.run import TrainingRun, memory_errors
from sftcli.services.train.start.inputs import TrainingInputs, find_inputs
from sftcli.services.train.ways import Sizes, Way, ways_beside
from sftcli.training.loss import chunk_logits
from sftcli.training.out_of_memory import SPARE
from sftcli.training.probes.cost import StepCost, measure_cost
from sftcli.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WITH_REPLAY = "--replay 20%"
_CHUNKS_IN_GAPS = 2.5  # float32 logits of a chunk; runs were measured with 1.5 to 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds. ``peak_bytes`` is that of the process, or of a device with separate memory."""

    model: str
    parameters: int
    trainable: int
    device: str
    precision: str
    train_examples: int
    replayed_examples: int  # of these, rows of earlier runs
    heldout_examples: int
    steps: int
    batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int  # most positions of a micro-batch of packed rows; 0 where its rows are limited
    longest_micro_batch: tuple[int, int]  # rows of data, positions
    scanned_steps: int  # in which it was looked for
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    head_bytes: int
    program_bytes: int  # libraries and all else of the process; 0 on a device with memory of its own
    other_bytes: int  # passing tensors of the backward pass, and gaps between blocks: what the peak holds beyond the above
    checkpoint_copy_bytes: int  # the copy that is written while training goes on
    peak_bytes: int
    total_memory_bytes: int  # of the machine; on a GPU what is free there, and what this process holds
    checkpoint_bytes: int  # on disk
    step_seconds: float
    evaluations: int
    evaluation_seconds: float  # each
    start_seconds: float  # all before the first step: libraries, rows, model
    save_seconds: float  # for a checkpoint, from a part of one
    seconds: float  # in all, from the start to the final model
    budget: Budget | None  # where a time was given
    price: float | None  # of ``seconds``, where an hour has one
    ways: list[Way]  # this one and others, and whether each fits


def plan_training(settings: Settings, session: Session) -> Plan:
    """Measure a few steps and estimate what the full training needs.

    Raises:
        ResourceError: Not even the probe fits into memory.
        UsageError: Not one step fits into the time that is given.
    """
    if (parts := settings.training.context_processes) > 1:
        session.emit(
            Notice(text=f"one process computes whole rows here; {parts} that share them keep a part each")
        )
        settings = with_values(settings, {"training.context_processes": 1})
    nowhere = RunFolder(Path(settings.run.root) / "plan")  # nothing is saved there
    run = TrainingRun(folder=nowhere, settings=settings, session=session)
    run.take(find_inputs(settings, session))
    if settings.training.max_minutes is None:
        run.inputs.tell_doubts(session.emit, with_replay=_WITH_REPLAY)
    with kernels_as_set(settings.training, session.emit):
        return _planned(run)


def _planned(run: TrainingRun) -> Plan:
    session = run.session
    run.build(settle_precision(Decisions(), run.settings.training.precision, choose_device()))
    inputs, settings, trainer, model = run.inputs, run.settings, run.trainer, run.parts.model
    # A probe that went on with smaller micro-batches would measure something else.
    trainer.ladder.is_short = True
    start, before = monotonic() - run.begun, 0
    if trainer.device.type == "cpu":
        before = memory_bytes(trainer.device) - _model_bytes(trainer)
    load_peak = held_peak_bytes(trainer.device)
    session.emit(Notice(text="measuring a few steps, the last one on the longest micro-batch"))
    with memory_errors(trainer.tried, resume_command="sft train --plan"):
        cost = measure_cost(trainer, last_step=settings.training.max_steps)
    total, trainable = count_parameters(model)
    scored = sum(inputs.prepared.dataset.heldout.num_tokens) * cost.forward_seconds_per_token
    saving = save_seconds(inputs, Path(settings.run.root), trainer.store)
    pace = Pace(start=start, step=cost.step_seconds, evaluation=scored, save=saving)
    budget = _budget(pace, inputs)
    if budget is not None:
        inputs = inputs.ending_at(budget.steps, budget.origin)
        settings = inputs.settings
        inputs.tell_doubts(session.emit, with_replay=_WITH_REPLAY)
    steps = settings.training.max_steps
    evaluations = evaluations_of(settings, steps, len(inputs.prepared.dataset.heldout))
    seconds = pace.seconds(steps, settings, evaluations=evaluations)
    peak = cost.peak + (_gaps(cost, model) if trainer.device.type == "cpu" else 0)
    copy = _copy_bytes(cost, trainable, trainer.device) if _copies(settings, seconds) else 0
    memory = reachable_memory_bytes(trainer.device)
    return Plan(
        model=inputs.located.name,
        parameters=total,
        trainable=trainable,
        device=str(trainer.device),
        precision=dtype_name(trainer.weights.compute_dtype),
        train_examples=len(inputs.prepared.dataset.train),
        replayed_examples=0 if inputs.earlier is None else inputs.earlier.replayed,
        heldout_examples=len(inputs.prepared.dataset.heldout),
        steps=steps,
        batch_size=settings.training.rows_per_step,
        micro_batch_size=settings.training.micro_batch_size,
        micro_batch_tokens=trainer.plan.micro_batch_tokens,
        longest_micro_batch=(cost.longest_rows, cost.longest_tokens),
        scanned_steps=cost.scanned_steps,
        weights_bytes=cost.weights,
        gradients_bytes=cost.gradients,
        optimizer_bytes=cost.optimizer,
        activations_bytes=cost.activations,
        head_bytes=cost.head,
        program_bytes=max(0, before),
        other_bytes=max(0, peak - max(0, before) - _known(cost)),
        checkpoint_copy_bytes=copy,
        peak_bytes=max(load_peak, peak + copy),
        total_memory_bytes=memory,
        checkpoint_bytes=4 * total + cost.optimizer,
        step_seconds=cost.step_seconds,
        evaluations=evaluations,
        evaluation_seconds=scored,
        start_seconds=start,
        save_seconds=saving,
        seconds=seconds,
        budget=budget,
        price=price_of(seconds, settings.run.price_per_hour),
        ways=ways_beside(
            settings,
            _sizes(run, cost, total=total, trainable=trainable, copies=copy > 0),
            peak=max(load_peak, peak + copy),
            memory=memory,
            has_cuda=trainer.device.type == "cuda",
            has_one_pass=len(trainer.plan.window(0)) == 1,
        ),
    )


def _sizes(run: TrainingRun, cost: StepCost, *, total: int, trainable: int, copies: bool) -> Sizes:
    settings, model, folder = run.settings, run.parts.model, run.inputs.located.folder
    is_on, dtype = settings.adapter.is_on, run.trainer.weights.compute_dtype
    has_checkpointing = settings.training.gradient_checkpointing.is_on
    adapter = trainable if is_on else adapter_bytes(folder, settings.adapter) // 4
    layers, hidden = (int(config_value(model, name) or 0) for name in ("num_hidden_layers", "hidden_size"))
    inputs = layers * cost.longest_tokens * hidden * dtype.itemsize
    if has_checkpointing:
        inputs = cost.activations
    elif inputs and model.supports_gradient_checkpointing:
        inputs = min(cost.activations, inputs + cost.activations // layers)  # and all of one layer
    return Sizes(
        trained=total - adapter if is_on else trainable,
        total=total - adapter if is_on else total,
        embeddings=embedding_bytes(folder) // 4,
        adapter=adapter,
        itemsize=dtype.itemsize,
        is_bf16=dtype == torch.bfloat16,
        pass_bytes=0 if has_checkpointing else cost.activations,
        inputs_bytes=inputs if model.supports_gradient_checkpointing else 0,
        copies=copies,
    )


def _gaps(cost: StepCost, model: "PreTrainedModel") -> int:
    """Return the bytes between the blocks that a run keeps, which the probe has given back.

    A run may hold ``SPARE`` of a step without gaps (``KeptMemory``). Within a step the largest blocks, logits of a chunk in
    two precisions and their gradient, leave gaps for those of another size.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    logits = min(chunk_logits(model.device), cost.longest_tokens * vocabulary)
    return round((SPARE - 1) * cost.peak + _CHUNKS_IN_GAPS * 4 * logits)


def _copy_bytes(cost: StepCost, trainable: int, device: torch.device) -> int:
    """Return what the copy of a checkpoint takes there: it is in the machine's memory, not in that of a device of its own."""
    return 0 if device.type == "cuda" else cost.optimizer + 4 * trainable


def _known(cost: StepCost) -> int:
    return cost.weights + cost.gradients + cost.optimizer + cost.activations + cost.head


def _model_bytes(trainer: Trainer) -> int:
    weights = trainer.weights
    tensors = {*weights.model.parameters(), *weights.masters.values(), *weights.remainders.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies(settings: Settings, seconds: float) -> bool:
    """Return whether a checkpoint is written in the background before the last step."""
    every = settings.checkpoint.every_steps
    early = settings.training.early_stopping_evals > 0
    timed = 0 < 60 * settings.checkpoint.every_minutes < seconds
    return settings.checkpoint.in_background and (early or timed or 0 < every < settings.training.max_steps)


def _budget(pace: Pace, inputs: TrainingInputs) -> Budget | None:
    """Return what a time that is given allows; a training that is given one takes a few steps to measure them."""
    minutes = inputs.settings.training.max_minutes
    if minutes is None:
        return None
    measured = replace(pace, start=pace.start + USUAL * pace.step)
    return count_steps(measured, inputs, minutes=minutes, end=other_end(inputs, inputs.decided.origins))
