"""Train and resume: builds the parts, runs the trainer, leaves a run folder behind."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli.config.sources import Resolved, Settings, to_toml
from sftcli.errors import DataError, Location, StoppedError, UsageError
from sftcli.events import (
    Ending,
    EventSink,
    ModelSaved,
    Notice,
    RunStarted,
    StopFlag,
    Warned,
    fan_out,
)
from sftcli.modeling.load import quiet_libraries
from sftcli.modeling.model_folder import save_model_folder
from sftcli.modeling.pt_checkpoint import model_differences
from sftcli.modeling.remote_code import allow_code
from sftcli.runtime import monotonic, seed_everything
from sftcli.services.adapters import check_machine
from sftcli.services.base_model import locate_base, record_base
from sftcli.services.building import Built, Materials, build_trainer
from sftcli.services.comparing import compare, fingerprints
from sftcli.services.finishing import take_best
from sftcli.services.lock import RunLock
from sftcli.services.machine import check_one_process, facts_of_start
from sftcli.services.memory import memory_errors
from sftcli.services.prepare import find_sources, prepare_data, require_rows
from sftcli.services.pt_output import write_final_pt
from sftcli.services.report import write_report
from sftcli.services.resuming import (
    choose_checkpoint,
    clear_leftovers,
    record_resume,
)
from sftcli.services.run_folder import (
    RunFolder,
    create_run,
    existing_run,
    is_unstarted,
    write_json,
    write_text,
)
from sftcli.services.run_log import RunLog
from sftcli.services.space import check_space, checkpoint_bytes
from sftcli.services.spike_stop import SpikeStop
from sftcli.services.thresholds import find_exceeded, find_unfit, require, require_fit
from sftcli.services.trackers import tracked
from sftcli.services.verdict import Verdict
from sftcli.services.watch import FitWatch, watched
from sftcli.training.checkpoint_files import read_snapshot
from sftcli.training.checkpoint_names import list_checkpoints, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A new run. ``label`` starts its name where the settings give none; ``command`` is what the user typed."""

    resolved: Resolved
    label: str
    command: str
    auto: bool = False  # go on with the run of this name where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """How a run ended. Losses are nats per response token, the last one that of ``final``; None where nothing is held out."""

    run: str
    path: str
    ending: Ending
    step: int
    last_step: int
    first_heldout_loss: float | None
    last_heldout_loss: float | None
    final: str | None  # folder of the tuned model; None when stopped before the end
    seconds: float
    verdict: Verdict | None = None  # on the curves of the run up to the step of ``final``


def run_training(request: TrainRequest, emit: EventSink, stop: StopFlag) -> TrainOutcome:
    """Start a new run and train it to its end, or until ``stop`` is set; with ``auto`` go on with it if it exists.

    Raises:
        OutputError: The run exists and ``auto`` is not set, or another process trains it.
        StoppedError: ``stop`` was set before the first step.
    """
    check_one_process(os.environ)
    settings = request.resolved.settings
    check_machine(settings.adapter)  # before there is a folder
    run = existing_run(settings.run) if request.auto or is_unstarted(settings.run) else None
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
        with (
            RunLog(run, every_steps=settings.training.log_every_steps, after_step=-1) as log,
            tracked(run, settings, fan_out(log, emit), after_step=-1) as both,
        ):
            for text in request.resolved.notices:
                both(Notice(text=text))
            return _train(run, settings, both, stop, lock, model_keys=request.resolved.model_keys)


def complete_already(run: RunFolder, settings: Settings, checkpoint: Path, emit: EventSink) -> TrainOutcome:
    """Say that a finished run is left as it is."""
    emit(Notice(text=f"{run.name} is complete already: step {step_of(checkpoint)}"))
    return _outcome(run, settings, Ending.FINISHED, step_of(checkpoint), (None, None), seconds=0.0)


def continue_run(
    run: RunFolder,
    settings: Settings,
    checkpoint: Path,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    allowed: Sequence[str] = (),
) -> TrainOutcome:
    """Train on from ``checkpoint``, which verifies; ``allowed`` may differ. The caller holds the lock."""
    step = step_of(checkpoint)
    with (
        RunLog(run, every_steps=settings.training.log_every_steps, after_step=step) as log,
        tracked(run, settings, fan_out(log, emit), after_step=step) as both,
    ):
        return _train(run, settings, both, stop, lock, checkpoint=checkpoint, allowed=allowed)


def _train(
    run: RunFolder,
    settings: Settings,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    checkpoint: Path | None = None,
    model_keys: Mapping[str, object] | None = None,
    allowed: Sequence[str] = (),
) -> TrainOutcome:
    begin = monotonic()
    watch = FitWatch(stops_early=settings.training.early_stopping_evals > 0)
    if checkpoint is not None:
        watch.replay(run.iterate_events())
    emit = watched(watch, emit)
    emit(RunStarted(run=run.name, path=str(run.path)))
    materials = find_materials(settings, emit, stop, run=run)
    located, prepared, settings = materials.located, materials.prepared, materials.settings
    for text in model_differences(located.folder, model_keys or {}):
        emit(Warned(text=text))
    if checkpoint is not None:
        changes = compare(checkpoint, materials.fingerprints, allowed=allowed)
        record_resume(run, checkpoint, changes, emit)
    record_base(run, located)
    check_space(run, checkpoint_bytes(settings, located.folder), settings.checkpoint, emit)
    if materials.trusted_code:
        write_json(run.about, run.read_about() | {"trusted_code": dict(materials.trusted_code)})
    write_json(run.data, {"fingerprint": prepared.dataset.fingerprint, **prepared.dataset.about})
    emit(Notice(text=f"Loading pretrained model from {located.folder}"))
    seed_everything(settings.training.seed)
    built = build_trainer(run, materials, emit, check_owner=lock.check)
    trainer = built.trainer
    watch.name_rows = trainer.name_rows
    if checkpoint is not None:
        trainer.restore(read_snapshot(checkpoint))
    spikes = SpikeStop(stop=stop, watch=watch, settings=settings.training)
    with memory_errors(trainer.tried, resume_command=f"sft resume {run.name}"):
        ending = trainer.fit(spikes)
    if not trainer.state.step:
        raise StoppedError
    ended_at = trainer.state.step
    if ending is not Ending.STOPPED:
        lock.check()
        take_best(trainer, run, settings.training, emit)
        _save_final(run, materials, built, emit)
    _report(run, emit)
    if ending is Ending.STOPPED:
        spikes.refuse_spoilt(run, ended_at)
    state = trainer.state
    losses = (state.first_heldout_loss, state.last_heldout_loss)
    outcome = _outcome(run, settings, ending, ended_at, losses, seconds=monotonic() - begin)
    return outcome if ending is Ending.STOPPED else replace(outcome, verdict=watch.verdict(state.step))


def _save_final(run: RunFolder, materials: Materials, built: Built, emit: EventSink) -> None:
    snapshot, pt = built.trainer.snapshot(), ""
    if built.adapter is not None:
        built.adapter.save(run.final, snapshot)
    else:
        pt = write_final_pt(built.model, run, materials.settings, snapshot)
        save_model_folder(
            built.model,
            source=materials.located.folder,
            folder=run.final,
            stop_ids=materials.prepared.tokenizer.stop_ids,
            template=materials.prepared.tokenizer.chosen_template,
        )
    emit(ModelSaved(path=str(run.final), pt=pt))


def _report(run: RunFolder, emit: EventSink) -> None:
    try:
        write_report([run], run.report)
    except Exception as error:  # noqa: BLE001 - a page about the run must not take the run down
        emit(Warned(text=f"no report was written: {error}"))


def find_materials(
    settings: Settings, emit: EventSink, stop: StopFlag, *, run: RunFolder | None = None
) -> Materials:
    """Find model and data; fill in the settings that depend on the rows. ``run`` names weights, and stands in for the cache."""
    quiet_libraries()
    check_machine(settings.adapter)
    sources = find_sources(settings.data)
    located = locate_base(settings.model, emit, run=run)
    if stop.requested():
        raise StoppedError
    prepared = prepare_data(
        settings.data,
        sources,
        model_folder=located.folder,
        seed=settings.training.seed,
        emit=emit,
        stop=stop,
        fallback=None if run is None else run.path / "cache",
    )
    require_rows(prepared)
    audits = list(prepared.audit.values())
    require_fit(find_unfit(audits, settings.data))
    require(find_exceeded(audits, settings.data))
    if not len(prepared.dataset.train):
        raise DataError("there are only held-out rows, and none to train on", hint="name some with --data")
    if settings.training.early_stopping_evals and not len(prepared.dataset.heldout):
        raise UsageError(
            "training.early_stopping_evals needs held-out rows, and there are none",
            hint="set data.heldout_fraction, or name rows with --heldout",
            location=Location(key="training.early_stopping_evals"),
        )
    training = settings.training.for_rows(
        len(prepared.dataset.train), text_fraction=settings.data.text_fraction
    )
    settings = settings.model_copy(update={"training": training})
    trusted = (
        allow_code(located.folder, name=located.name, commit=located.revision, emit=emit)
        if settings.model.trust_remote_code
        else {}
    )
    return Materials(
        settings=settings,
        trusted_code=trusted,
        located=located,
        prepared=prepared,
        fingerprints=fingerprints(settings, located, prepared),
    )


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
        final=None if ending is Ending.STOPPED else str(run.final),
        seconds=seconds,
    )
