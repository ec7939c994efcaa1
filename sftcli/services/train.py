"""Train and resume: builds the parts, runs the trainer, leaves a run folder behind."""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli import __version__
from sftcli.config.sources import Resolved, Settings, resolve, to_toml
from sftcli.data.batch import Batch, BatchPlan, ExampleSource, batches_in_order_of_length, collate
from sftcli.errors import DataError, MismatchError, NotFoundError
from sftcli.events import (
    Ending,
    EventSink,
    ModelLoaded,
    ModelSaved,
    Notice,
    RunStarted,
    StopFlag,
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
from sftcli.services.prepare import PreparedData, prepare_data
from sftcli.services.report import write_report
from sftcli.services.run_folder import (
    RunFolder,
    RunLog,
    create_run,
    find_run,
    newest_run,
    write_json,
    write_text,
)
from sftcli.training.checkpoint import (
    DirectoryCheckpointStore,
    list_checkpoints,
    read_fingerprints,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """Go on with ``run``, or the newest unfinished one under ``root``; from ``step``, or the newest checkpoint."""

    root: Path
    run: str | None = None
    step: int | None = None


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
    """Start a new run and train it to its end, or until ``stop`` is set."""
    settings = request.resolved.settings
    run = create_run(settings.run, label=request.label)
    write_text(run.config, to_toml(settings))
    write_json(run.origins, dict(request.resolved.origins))
    write_json(
        run.about,
        {
            "started_at": datetime.now(tz=UTC).isoformat(timespec="microseconds"),
            "command": request.command,
            "version": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    with RunLog(run, every_steps=settings.training.log_every_steps) as log:
        return _train(run, settings, fan_out(log, emit), stop)


def resume_training(request: ResumeRequest, emit: EventSink, stop: StopFlag) -> TrainOutcome:
    """Go on with a run as if it had never stopped. A finished run is left as it is.

    Raises:
        NotFoundError: No such run, or it has no checkpoint.
        MismatchError: Data or model are not what the run was started with.
    """
    root = request.root
    run = newest_run(root, finished=False) if request.run is None else find_run(request.run, root)
    settings = resolve(preset=None, config_file=run.config, overrides=(), environ={}).settings
    checkpoint = _find_checkpoint(run, request.step)
    if run.is_finished and request.step is None:
        emit(Notice(text=f"{run.name} is complete already: step {step_of(checkpoint)}"))
        return _outcome(run, settings, Ending.FINISHED, step_of(checkpoint), (None, None), seconds=0.0)
    with RunLog(run, every_steps=settings.training.log_every_steps, after_step=step_of(checkpoint)) as log:
        return _train(run, settings, fan_out(log, emit), stop, checkpoint=checkpoint)


def _train(
    run: RunFolder, settings: Settings, emit: EventSink, stop: StopFlag, *, checkpoint: Path | None = None
) -> TrainOutcome:
    begin = monotonic()
    emit(RunStarted(run=run.name, path=str(run.path)))
    quiet_libraries()
    located = locate_model(settings.model.name, revision=settings.model.revision, emit=emit)
    prepared = prepare_data(
        settings.data, model_folder=located.folder, seed=settings.training.seed, emit=emit, stop=stop
    )
    if not len(prepared.dataset.train):
        raise DataError("no row is left to train on", hint="sft prepare says why each row was rejected")
    settings = settings.model_copy(
        update={"training": settings.training.for_rows(len(prepared.dataset.train))}
    )
    write_json(run.data, {"fingerprint": prepared.dataset.fingerprint, **prepared.dataset.about})
    emit(Notice(text=f"Loading pretrained model from {located.folder}"))
    seed_everything(settings.training.seed)
    trainer, model = _build_trainer(run, settings, located, prepared, emit)
    if checkpoint is not None:
        _compare_fingerprints(checkpoint, _fingerprints(located, prepared))
        trainer.restore(read_snapshot(checkpoint))
    ending = trainer.fit(stop)
    if ending is Ending.FINISHED:
        save_model_folder(
            model,
            source=located.folder,
            folder=run.final,
            stop_ids=prepared.tokenizer.stop_ids,
            template=prepared.tokenizer.chosen_template,
        )
        emit(ModelSaved(path=str(run.final)))
    if trainer.state.step:
        write_report([run], run.report)
    state = trainer.state
    losses = (state.first_heldout_loss, state.last_heldout_loss)
    return _outcome(run, settings, ending, state.step, losses, seconds=monotonic() - begin)


def _build_trainer(
    run: RunFolder, settings: Settings, located: LocatedModel, prepared: PreparedData, emit: EventSink
) -> "tuple[Trainer, PreTrainedModel]":
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
        keep_last=settings.checkpoint.keep_last,
        write_model_files=partial(
            write_model_files,
            model,
            source=located.folder,
            stop_ids=prepared.tokenizer.stop_ids,
            template=prepared.tokenizer.chosen_template,
        ),
        fingerprints=_fingerprints(located, prepared),
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


def _fingerprints(located: LocatedModel, prepared: PreparedData) -> dict[str, str]:
    config = (located.folder / "config.json").read_bytes()
    return {"data": prepared.dataset.fingerprint, "model config": hashlib.sha256(config).hexdigest()}


def _compare_fingerprints(checkpoint: Path, now: dict[str, str]) -> None:
    then = read_fingerprints(checkpoint)
    changed = [name for name in now if then.get(name) != now[name]]
    if changed:
        raise MismatchError(
            f"{checkpoint} was made with another {' and another '.join(changed)}",
            hint="put the data back as it was, or start a new run: sft train",
        )


def _find_checkpoint(run: RunFolder, step: int | None) -> Path:
    found = list_checkpoints(run.checkpoints)
    if not found:
        raise NotFoundError(f"run {run.name} has no checkpoint yet", hint="start it again: sft train")
    if step is None:
        return found[-1]
    for checkpoint in found:
        if step_of(checkpoint) == step:
            return checkpoint
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found)
    raise NotFoundError(f"run {run.name} has no checkpoint of step {step}", hint=f"it has: {steps}")


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
