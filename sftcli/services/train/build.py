"""Builds a trainer from settings, model and data: the one place where the parts of training are assembled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.settings import Settings
from sftcli.data.batches.batch import (
    Batch,
    ExampleSource,
    batches_in_order_of_length,
    collate,
)
from sftcli.data.batches.progress import with_progress
from sftcli.events import EventSink, ModelLoaded, Notice, StopFlag
from sftcli.extras import install_command
from sftcli.modeling.activations import checkpoint_activations, ways_down
from sftcli.modeling.architecture import opens_whole, require_causal
from sftcli.modeling.attention import attention_of, use_named_attention
from sftcli.modeling.formats.folder_write import is_part_of_whole, write_model_files
from sftcli.modeling.formats.source_tensors import check_names_come_back
from sftcli.modeling.kernels.state_kernels import missing_kernels
from sftcli.modeling.kernels.told_positions import spare_search_of_own_positions
from sftcli.modeling.load import (
    count_parameters,
    own_attention,
)
from sftcli.runtime import (
    choose_device,
    dtype_named,
    keep_freed_memory,
    matmul_flops,
    pass_sizes,
    stop_keeping_memory,
)
from sftcli.services.models.modern_llm import PtFiles, pt_files
from sftcli.services.prepare.capacity import require_positions
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Decisions
from sftcli.services.train.adapters import AdapterFiles
from sftcli.services.train.batch_plan import plan_maker
from sftcli.services.train.compiling import try_compiled
from sftcli.services.train.decisions import require_same
from sftcli.services.train.loading import Compute, LoadedModel, compiles, load_for_training, streamed
from sftcli.services.train.releasing import gradient_release
from sftcli.services.train.speedups import try_ways
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.services.train.start.parallelism import (
    can_ease_together,
    choose_shards,
    make_weights,
    sharing_of,
)
from sftcli.training.checkpoint.format import ADAPTER, MODEL
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.checkpoint.together import Leader, Notes, PartStore
from sftcli.training.distributed.group import Group
from sftcli.training.embeddings import add_embedding_noise, embedding_names
from sftcli.training.experts.balance import BalancedLoss, require_balance
from sftcli.training.experts.expert_load import ExpertMeter
from sftcli.training.loss import BatchLoss, NllSum, heldout_nll
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.out_of_memory import MemoryLadder
from sftcli.training.probes.loss import choose_batch_loss
from sftcli.training.probes.packing import attention_in_words
from sftcli.training.probes.rows import cut_rows
from sftcli.training.probes.shared_rows import WORK, share_rows
from sftcli.training.state import CheckpointStore, ForgetfulStore, HeldoutLoss
from sftcli.training.trainer import Trainer
from sftcli.training.utilization import Gauge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParts:
    """A trainer with the model that it trains, what its adapter's folders hold where one is trained, and what was decided.

    ``is_plain`` as in ``SourceTensors``: else a checkpoint is not all that a model folder of its kind holds.
    """

    trainer: Trainer
    model: "PreTrainedModel"
    adapter: AdapterFiles | None
    decisions: Decisions  # complete
    is_plain: bool
    pt: PtFiles | None = None  # beside its checkpoints, where its model has such files


def build_trainer(
    run: RunFolder,
    inputs: TrainingInputs,
    emit: EventSink,
    *,
    check_owner: Callable[[], None],
    group: Group,
    recorded: Decisions,
    trainer_type: type[Trainer] = Trainer,
    notes: Notes | None = None,
) -> TrainingParts:
    """Load the model and put the parts of a run together, those of this process in ``group``.

    Args:
        run: Where they write.
        inputs: What they are made of.
        emit: Hears what is decided.
        check_owner: Raises an error where another process has taken the run.
        group: The processes that train together.
        recorded: What was decided before: by the run that goes on, or by the first process. Its precision is.
        trainer_type: What takes the steps.
        notes: By which the processes agree on the checkpoints that they write together, where there are several.

    Raises:
        MismatchError: Something that is recorded cannot be had here.
    """
    device = choose_device()
    group.share_rows(inputs.settings.training.context_processes)
    assert recorded.precision is not None
    dtype = dtype_named(recorded.precision, device)
    shards = choose_shards(
        inputs.settings, inputs.located.folder, group, dtype=dtype, device=device, recorded=recorded.weights
    )
    compute = Compute(device=device, dtype=dtype, group=group, shards=shards)
    # Layers that come and go leave gaps in memory that is kept.
    (stop_keeping_memory if compute.shares else keep_freed_memory)(device)
    loaded = load_for_training(inputs, recorded, compute, emit)
    require_positions(loaded.model, inputs.prepared)
    pt = None if loaded.adapter else pt_files(loaded.model, run, inputs.settings)
    # An adapter is small, and its weights are one file.
    meeting = notes if compute.shares and loaded.adapter is None else None
    leader = None if meeting is None else Leader(meeting, processes=group.size)
    store = (
        _store(run, inputs, loaded, pt, check_owner, others=leader)
        if group.is_writer
        else _store_of_follower(run, meeting, group)
    )
    parts = assemble(
        loaded, inputs, recorded, compute=compute, store=store, emit=emit, trainer_type=trainer_type
    )
    require_same(recorded, parts.decisions, what=run.name)
    return replace(parts, pt=pt)


def assemble(
    loaded: LoadedModel,
    inputs: TrainingInputs,
    recorded: Decisions,
    *,
    compute: Compute,
    store: CheckpointStore,
    emit: EventSink,
    trainer_type: type[Trainer] = Trainer,
) -> TrainingParts:
    """Try what makes the training of a model faster and build its trainer, with what is ``recorded`` and what is decided here."""
    settings, model, group = inputs.settings, loaded.model, compute.group
    with streamed(model, loaded.files):
        require_causal(model)
        tried = try_ways(
            model, loaded.fusion, inputs, recorded=recorded, emit=emit, with_gradients=not compute.shares
        )
        _tell_beside(loaded, inputs.located.folder, emit)
        if settings.training.router_aux_loss:
            require_balance(model, _padded_rows(inputs))
    weights = make_weights(
        model,
        settings,
        group,
        dtype=compute.dtype,
        device=compute.device,
        shards=compute.shards,
        files=loaded.files,
    )
    if compute.shares:
        keep_freed_memory(compute.device)
    if settings.training.neftune_alpha:
        add_embedding_noise(model, settings.training.neftune_alpha, parts=group.parts)
    use_named_attention(model)
    spare_search_of_own_positions(model)
    attention = attention_of(model)
    peak = matmul_flops(compute.device, compute.dtype)
    emit(_model_loaded(model, inputs.located.name, recorded, compute.device, peak_flops=peak))
    if message := own_attention(model):
        emit(Notice(text=message))
    if missing := missing_kernels(model):
        emit(Notice(text=_slow_states(model, missing)))
    head = choose_batch_loss(
        model,
        _probe_batch(inputs.prepared.dataset.train, inputs.pad_id).to(compute.device),
        emit=emit,
        gathered=weights.gathered,
        recorded=tried.head,
        loss=settings.training.loss,
    )
    batch_loss, before_step = _step_loss(model, inputs, head.batch_loss, compute)
    make_plan, sharing = plan_maker(
        model,
        inputs,
        emit=emit,
        recorded=recorded.packing,
        kernel=recorded.kernel,
        ruled_out=tried.ruled_out,
    )
    if group.parts > 1:
        share_rows(
            model,
            cut_rows(model, inputs.prepared.dataset.train, work=WORK),
            group=group,
            batch_loss=head.batch_loss,
            sharing=sharing,
            pad_id=inputs.pad_id,
        )
    named = make_plan(settings.training.micro_batch_size)
    ladder = MemoryLadder(
        micro_batch_size=settings.training.micro_batch_size,
        make_plan=make_plan,
        ways=ways_down(model, settings.training.gradient_checkpointing, compute.device),
        checkpoint=partial(checkpoint_activations, model),
    )
    probe = _probe_batch(inputs.prepared.dataset.train, inputs.pad_id).to(compute.device)
    # A process that ran out of memory would leave the others inside an exchange, if it could not end that.
    ladder.is_short = group.parts > 1 or not can_ease_together(weights, head.batch_loss, probe)
    optimizer = make_optimizer(
        weights.masters,
        settings.training,
        embeddings=embedding_names(model),
        remainders=weights.remainders,
        shard_group=weights.shard_group,
    )
    trainer = trainer_type(
        settings=settings.training,
        checkpoint=settings.checkpoint
        if group.is_writer or weights.saves_parts
        else settings.checkpoint.model_copy(update={"in_background": False}),
        weights=weights,
        optimizer=optimizer,
        release=gradient_release(weights, optimizer, settings.training, group=group, plan=named, emit=emit),
        batch_loss=batch_loss,
        before_step=before_step,
        ladder=ladder,
        heldout_loss=_heldout_loss(model, inputs, head.batch_loss, compute, emit),
        store=store,
        emit=emit,
        device=compute.device,
        name_row=lambda index: str(named.example(index).origin),
        group=group,
        gauge=Gauge.of(model, peak_flops=peak * group.size),
    )
    compiled = (
        try_compiled(
            model,
            min(named.window(0), key=lambda batch: batch.input_ids.numel()).to(compute.device),
            head.batch_loss,
            settings=settings.training,
            sharing=sharing,
            discard=trainer.discard_gradients,
            emit=emit,
        )
        if compiles(settings.training, recorded, compute)
        else ()
    )
    decisions = replace(
        recorded,
        attention=attention,
        layers=compiled or tried.layers,
        packing=sharing,
        kernel=attention_in_words(model, sharing),
        head=head.kind,
        weights=sharing_of(compute.shards, group),
    )
    return TrainingParts(
        trainer=trainer,
        model=model,
        adapter=loaded.adapter,
        decisions=decisions,
        is_plain=loaded.source.is_plain,
    )


def _model_loaded(
    model: "PreTrainedModel", name: str, recorded: Decisions, device: torch.device, *, peak_flops: float
) -> ModelLoaded:
    total, trainable = count_parameters(model)
    return ModelLoaded(
        name=name,
        parameters=total,
        trainable=trainable,
        device=str(device),
        precision=recorded.precision or "",
        precision_why=recorded.precision_why or "",
        peak_flops=peak_flops,
    )


def _store(
    run: RunFolder,
    inputs: TrainingInputs,
    loaded: LoadedModel,
    pt: PtFiles | None,
    check_owner: Callable[[], None],
    *,
    others: Leader | None,
) -> CheckpointStore:
    settings, prepared = inputs.settings, inputs.prepared
    model, adapter = loaded.model, loaded.adapter
    return DirectoryCheckpointStore(
        run.checkpoints,
        settings=_kept(settings),
        write_model_files=partial(
            write_model_files,
            model,
            source=inputs.located.folder,
            stop_ids=prepared.tokenizer.stop_ids,
            template=prepared.tokenizer.chosen_template,
        )
        if adapter is None
        else adapter.write,
        weights_name=MODEL if adapter is None else ADAPTER,
        fingerprints=inputs.fingerprints,
        resume_command=f"sft resume {run.argument}",
        check_owner=check_owner,
        write_beside=None if pt is None else pt.write_step,
        others=others,
    )


def _store_of_follower(run: RunFolder, meeting: Notes | None, group: Group) -> CheckpointStore:
    if meeting is None:
        return ForgetfulStore()
    return PartStore(run.checkpoints, meeting, rank=group.rank, weights_name=MODEL)


def _slow_states(model: "PreTrainedModel", missing: Sequence[str]) -> str:
    return (
        f"layers of {type(model).__name__} with a state run in their slow form; a GPU with these packages has a faster one, which "
        f"can also keep documents of one row apart: {install_command('hybrid', *missing)}"
    )


def _tell_beside(loaded: LoadedModel, folder: Path, emit: EventSink) -> None:
    """Say what ``folder`` holds beside the language model, if anything.

    Raises:
        MismatchError: The model could not be written back to where it was.
    """
    model, source = loaded.model, loaded.source
    beside = source.without_text(model)
    if not beside:
        return
    if loaded.adapter is None and (opens_whole(model) or is_part_of_whole(model, folder)):
        check_names_come_back(model, folder, source)
    emit(
        Notice(
            text=f"besides the language model there are {source.in_words(beside)}: they are not trained and are saved "
            "unchanged"
        )
    )


def _kept(settings: Settings) -> CheckpointSettings:
    """Return which checkpoints are kept: early stopping needs the best one."""
    keep_best = settings.checkpoint.keep_best or settings.training.early_stopping_evals > 0
    return settings.checkpoint.model_copy(update={"keep_best": keep_best})


def _probe_batch(examples: ExampleSource, pad_id: int) -> Batch:
    shortest = min(range(len(examples)), key=lambda index: examples.num_tokens[index])
    return collate([examples[shortest]], example_ids=[shortest], pad_id=pad_id)


def _padded_rows(inputs: TrainingInputs) -> Batch:
    """Return two rows, cut to a few tokens, one to fewer."""
    examples = inputs.prepared.dataset.train
    rows = [
        replace(row, input_ids=row.input_ids[:size], loss_mask=row.loss_mask[:size])
        for row, size in zip((examples[0], examples[-1 % len(examples)]), (12, 24), strict=True)
    ]
    return collate(rows, example_ids=(0, 1), pad_id=inputs.pad_id)


def _step_loss(
    model: "PreTrainedModel", inputs: TrainingInputs, batch_loss: BatchLoss, compute: Compute
) -> tuple[BatchLoss, Callable[[Sequence[Batch]], None] | None]:
    """Return the loss of micro-batches, and what must be called with those of a step before it, if anything."""
    coefficient = inputs.settings.training.router_aux_loss
    if not coefficient:
        return batch_loss, None
    balanced = BalancedLoss(
        batch_loss, model, coefficient=coefficient, group=compute.group, computes_all=compute.shares
    )
    return balanced, balanced.begin


def _heldout_loss(
    model: "PreTrainedModel",
    inputs: TrainingInputs,
    batch_loss: BatchLoss,
    compute: Compute,
    emit: EventSink,
) -> HeldoutLoss | None:
    heldout = inputs.prepared.dataset.heldout
    if not len(heldout):
        return None

    def measure(stop: StopFlag) -> NllSum | None:
        batches = batches_in_order_of_length(
            heldout,
            rows=range(len(heldout)),
            max_batch_tokens=pass_sizes(compute.device).heldout_positions,
            pad_id=inputs.pad_id,
        )
        batches = with_progress(batches, emit, task="held-out", total=len(heldout))
        meter = ExpertMeter(model)
        with meter.listening() as count:
            scored = heldout_nll(
                batch_loss,
                batches,
                stop=stop,
                group=compute.group,
                device=compute.device,
                computes_all=compute.shares,
                after_own=count,
                num_rows=len(heldout),
            )
        return scored and replace(scored, experts=meter.load(compute.group))

    return measure
