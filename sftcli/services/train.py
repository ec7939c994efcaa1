"""Train and resume: builds the parts, runs the trainer, leaves a run folder behind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.sources import Resolved, Settings, to_toml
from sftcli.data.batch import Batch, BatchPlan, ExampleSource, batches_in_order_of_length, collate
from sftcli.errors import DataError, StoppedError
from sftcli.events import (
    Ending,
    EventSink,
    ModelLoaded,
    ModelSaved,
    Notice,
    RunStarted,
    StopFlag,
    Warned,
    fan_out,
)
from sftcli.modeling.load import (
    count_parameters,
    load_model,
    quiet_libraries,
    save_model_folder,
    write_model_files,
)
from sftcli.modeling.locate import LocatedModel, locate_model
from sftcli.runtime import choose_device, choose_dtype, dtype_name, monotonic, seed_everything
from sftcli.services.lock import RunLock
from sftcli.services.machine import facts_of_start
from sftcli.services.memory import memory_errors
from sftcli.services.prepare import PreparedData, find_sources, prepare_data
from sftcli.services.report import write_report
from sftcli.services.resuming import (
    check_space,
    choose_checkpoint,
    clear_leftovers,
    compare,
    fingerprints,
    parameters_bytes,
    record_resume,
)
from sftcli.services.run_folder import (
    RunFolder,
    RunLog,
    create_run,
    existing_run,
    write_json,
    write_text,
)
from sftcli.training.checkpoint import DirectoryCheckpointStore
from sftcli.training.checkpoint_files import (
    list_checkpoints,
    read_snapshot,
    step_of,
)
from sftcli.training.loss import BatchLoss, NllSum, heldout_nll
from sftcli.training.optim import MasterWeights, freeze_embeddings, make_optimizer
from sftcli.training.probe import choose_batch_loss
from sftcli.training.trainer import HeldoutLoss, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELDOUT_BATCH_TOKENS = 4096  # positions scored at once; results do not depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A new run. ``label`` starts its name where the settings give none; ``command`` is what the user typed."""

    resolved: Resolved
    label: str
    command: str
    auto: bool = False  # go on with the run of this name where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """How a run ended. Losses are nats per response token; None where nothing is held out."""

    run: str
    path: str
    ending: Ending
    step: int
    last_step: int
    first_heldout_loss: float | None
    last_heldout_loss: float | None
    final: str | None  # folder of the tuned model; None when stopped before the end
    seconds: float


def run_training(request: TrainRequest, emit: EventSink, stop: StopFlag) -> TrainOutcome:
    """Start a new run and train it to its end, or until ``stop`` is set; with ``auto`` go on with it if it exists.

    Raises:
        OutputError: The run exists and ``auto`` is not set, or another process trains it.
        StoppedError: ``stop`` was set before the first step.
    """
    settings = request.resolved.settings
    run = existing_run(settings.run) if request.auto else None
    if run is None:
        run = create_run(settings.run, label=request.label)
    elif run.is_finished:
        return complete_already(run, settings, choose_checkpoint(run, None, emit), emit)
    with RunLock(run.path, emit) as lock:
        clear_leftovers(run, emit)
        if run.about.is_file() and list_checkpoints(run.checkpoints):
            return continue_run(run, settings, choose_checkpoint(run, None, emit), emit, stop, lock)
        write_text(run.config, to_toml(settings))
        write_json(run.origins, dict(request.resolved.origins))
        write_json(run.about, facts_of_start(request.command))
        with RunLog(run, every_steps=settings.training.log_every_steps, after_step=-1) as log:
            return _train(run, settings, fan_out(log, emit), stop, lock)


def complete_already(run: RunFolder, settings: Settings, checkpoint: Path, emit: EventSink) -> TrainOutcome:
    """Say that a finished run is left as it is."""
    emit(Notice(text=f"{run.name} is complete already: step {step_of(checkpoint)}"))
    return _outcome(run, settings, Ending.FINISHED, step_of(checkpoint), (None, None), seconds=0.0)


def continue_run(
    run: RunFolder, settings: Settings, checkpoint: Path, emit: EventSink, stop: StopFlag, lock: RunLock
) -> TrainOutcome:
    """Train on from ``checkpoint``, which verifies. The caller holds the lock."""
    with RunLog(run, every_steps=settings.training.log_every_steps, after_step=step_of(checkpoint)) as log:
        return _train(run, settings, fan_out(log, emit), stop, lock, checkpoint=checkpoint)


def _train(
    run: RunFolder,
    settings: Settings,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    checkpoint: Path | None = None,
) -> TrainOutcome:
    begin = monotonic()
    emit(RunStarted(run=run.name, path=str(run.path)))
    located, prepared, settings = find_materials(settings, emit, stop)
    if checkpoint is not None:
        changes = compare(checkpoint, fingerprints(settings, located, prepared))
        record_resume(run, checkpoint, changes, emit)
    check_space(run, parameters_bytes(located.folder), settings.checkpoint, emit)
    write_json(run.data, {"fingerprint": prepared.dataset.fingerprint, **prepared.dataset.about})
    emit(Notice(text=f"Loading pretrained model from {located.folder}"))
    seed_everything(settings.training.seed)
    trainer, model = build_trainer(run, settings, located, prepared, emit, check_owner=lock.check)
    if checkpoint is not None:
        trainer.restore(read_snapshot(checkpoint))
    with memory_errors(settings.training, resume_command=f"sft resume {run.name}"):
        ending = trainer.fit(stop)
    if not trainer.state.step:
        raise StoppedError
    if ending is Ending.FINISHED:
        lock.check()
        save_model_folder(
            model,
            source=located.folder,
            folder=run.final,
            stop_ids=prepared.tokenizer.stop_ids,
            template=prepared.tokenizer.chosen_template,
        )
        emit(ModelSaved(path=str(run.final)))
    _report(run, emit)
    state = trainer.state
    losses = (state.first_heldout_loss, state.last_heldout_loss)
    return _outcome(run, settings, ending, state.step, losses, seconds=monotonic() - begin)


def _report(run: RunFolder, emit: EventSink) -> None:
    try:
        write_report([run], run.report)
    except Exception as error:  # noqa: BLE001 - a page about the run must not take the run down
        emit(Warned(text=f"no report was written: {error}"))


def find_materials(
    settings: Settings, emit: EventSink, stop: StopFlag
) -> tuple[LocatedModel, PreparedData, Settings]:
    """Find model and data; fill in the settings that depend on the rows."""
    quiet_libraries()
    sources = find_sources(settings.data)
    located = locate_model(settings.model.name, revision=settings.model.revision, emit=emit)
    if stop.requested():
        raise StoppedError
    prepared = prepare_data(
        settings.data, sources, model_folder=located.folder, seed=settings.training.seed, emit=emit, stop=stop
    )
    if not len(prepared.dataset.train):
        raise DataError("no row is left to train on", hint="sft prepare says why each row was rejected")
    training = settings.training.for_rows(len(prepared.dataset.train))
    return located, prepared, settings.model_copy(update={"training": training})


def build_trainer(
    run: RunFolder,
    settings: Settings,
    located: LocatedModel,
    prepared: PreparedData,
    emit: EventSink,
    *,
    check_owner: Callable[[], None],
) -> "tuple[Trainer, PreTrainedModel]":
    """Load the model and put the parts of a run together."""
    device = choose_device()
    dtype = choose_dtype(settings.training.precision, device)
    model = load_model(located.folder, dtype=torch.float32, device=device)
    if not settings.training.train_embeddings:
        freeze_embeddings(model)
    weights = MasterWeights(model, compute_dtype=dtype)
    total, trainable = count_parameters(model)
    emit(
        ModelLoaded(
            name=located.name,
            parameters=total,
            trainable=trainable,
            device=str(device),
            precision=dtype_name(dtype),
        )
    )
    pad_id, examples = prepared.tokenizer.pad_id, prepared.dataset.train
    batch_loss = choose_batch_loss(model, _probe_batch(examples, pad_id).to(device), emit=emit)
    store = DirectoryCheckpointStore(
        run.checkpoints,
        settings=settings.checkpoint,
        write_model_files=partial(
            write_model_files,
            model,
            source=located.folder,
            stop_ids=prepared.tokenizer.stop_ids,
            template=prepared.tokenizer.chosen_template,
        ),
        fingerprints=fingerprints(settings, located, prepared),
        resume_command=f"sft resume {run.name}",
        check_owner=check_owner,
    )
    plan = BatchPlan(
        examples,
        batch_size=settings.training.batch_size,
        micro_batch_size=settings.training.micro_batch_size,
        pad_id=pad_id,
        seed=settings.training.seed,
    )
    trainer = Trainer(
        settings=settings.training,
        checkpoint=settings.checkpoint,
        weights=weights,
        optimizer=make_optimizer(weights.masters, settings.training),
        batch_loss=batch_loss,
        plan=plan,
        heldout_loss=_heldout_loss(prepared, batch_loss, device),
        store=store,
        emit=emit,
        device=device,
    )
    return trainer, model


def _probe_batch(examples: ExampleSource, pad_id: int) -> Batch:
    shortest = min(range(len(examples)), key=lambda index: examples.num_tokens[index])
    return collate([examples[shortest]], example_ids=[shortest], pad_id=pad_id)


def _heldout_loss(prepared: PreparedData, batch_loss: BatchLoss, device: torch.device) -> HeldoutLoss | None:
    heldout = prepared.dataset.heldout
    if not len(heldout):
        return None

    def measure(stop: StopFlag) -> NllSum | None:
        return heldout_nll(batch_loss, batches(), stop=stop)

    def batches() -> Iterator[Batch]:
        for batch in batches_in_order_of_length(
            heldout,
            rows=range(len(heldout)),
            max_batch_tokens=HELDOUT_BATCH_TOKENS,
            pad_id=prepared.tokenizer.pad_id,
        ):
            yield batch.to(device)

    return measure


def _outcome(
    run: RunFolder,
    settings: Settings,
    ending: Ending,
    step: int,
    losses: tuple[float | None, float | None],
    *,
    seconds: float,
) -> TrainOutcome:
    return TrainOutcome(
        run=run.name,
        path=str(run.path),
        ending=ending,
        step=step,
        last_step=settings.training.max_steps,
        first_heldout_loss=losses[0],
        last_heldout_loss=losses[1],
        final=str(run.final) if ending is Ending.FINISHED else None,
        seconds=seconds,
    )
