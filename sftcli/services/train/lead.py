"""Train and resume: builds the parts, runs the trainer, leaves a run folder behind."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli import storage
from sftcli.config.resolve import Resolved, to_toml
from sftcli.config.schema.settings import Settings
from sftcli.data.quality.thresholds import left_out
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
from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.modeling.formats.pt_file import model_differences
from sftcli.runtime import choose_device, monotonic
from sftcli.services.diagnosis.monitor import FitWatch, watched
from sftcli.services.diagnosis.spike_stop import SpikeStop
from sftcli.services.machine import facts_of_start
from sftcli.services.models.base import record_base, record_need
from sftcli.services.modern_llm import write_final_pt
from sftcli.services.processes.peers import Peers, joined, with_processes
from sftcli.services.processes.rank import find_place
from sftcli.services.report.html import write_report
from sftcli.services.runs.event_log import (
    RunLog,
    forgotten_if_unstarted,
    has_begun,
    is_unstarted,
    read_events,
)
from sftcli.services.runs.folder import (
    RunFolder,
    create_run,
    existing_run,
    json_text,
    read_settings,
    write_json,
    write_text,
)
from sftcli.services.runs.lock import RunLock
from sftcli.services.trackers.sink import tracked
from sftcli.services.train.build import Built, Materials
from sftcli.services.train.compatibility import Changes, compare, compare_data, compare_start, open_again
from sftcli.services.train.decisions import decisions_of, read_decisions, record_decisions, settle_precision
from sftcli.services.train.disk_space import check_space, checkpoint_bytes
from sftcli.services.train.inputs import find_materials
from sftcli.services.train.outcome import TrainOutcome, outcome_of, take_best
from sftcli.services.train.parallelism import check_sharing
from sftcli.services.train.resume_point import (
    choose_checkpoint,
    clear_leftovers,
    end_taking_back,
    record_resume,
    record_start_over,
    rhythm_text,
)
from sftcli.services.train.worker import (
    Assignment,
    agree_on_decisions,
    build_for,
    fit_together,
    follow,
    tell_sharing,
)
from sftcli.training.checkpoint.format import owes_heldout
from sftcli.training.checkpoint.names import in_use, list_checkpoints, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A new run. ``label`` starts its name where the settings give none; ``command`` is what the user typed."""

    resolved: Resolved
    label: str
    command: str
    auto: bool = False  # go on with the run of this name where there is one


def run_training(request: TrainRequest, emit: EventSink, stop: StopFlag) -> TrainOutcome:
    """Start a new run and train it to its end, or until ``stop`` is set; with ``auto`` go on with it if it exists.

    Raises:
        OutputError: The run exists and ``auto`` is not set, or another process trains it.
        StoppedError: ``stop`` was set before the first step.
    """
    check_sharing(request.resolved.settings)
    with joined(find_place(os.environ)) as peers:
        if not peers.group.is_writer:
            return follow(peers, stop, asked=request.resolved.settings)
        return _lead(request, emit, stop, peers)


def _lead(request: TrainRequest, emit: EventSink, stop: StopFlag, peers: Peers) -> TrainOutcome:
    settings = with_processes(request.resolved.settings, peers)
    run = existing_run(settings.run) if request.auto or is_unstarted(settings.run) else None
    is_new = run is None and settings.run.name is None
    started = _files_of_start(request, settings)
    if run is None:
        run = create_run(settings.run, label=request.label, files=started)
    elif run.is_finished:
        _require_same_as_finished(run, settings, emit, stop)
        return complete_already(run, settings, emit, peers)
    with forgotten_if_unstarted(run, emit, is_new=is_new), RunLock(run.path, emit) as lock:
        clear_leftovers(run, emit)
        if run.about.is_file() and list_checkpoints(run.checkpoints):
            checkpoint = choose_checkpoint(run, None, emit)
            return continue_run(run, settings, checkpoint, emit, stop, lock, peers=peers)
        is_same = _is_as_started(run, started)
        if is_same and has_begun(run):
            return start_over(run, settings, Changes(), emit, stop, lock, peers=peers)
        decided = decisions_of(run) if is_same else {}
        storage.try_remove_tree(run.data)  # of rows that may have been others
        for name, text in started.items():
            write_text(run.path / name, text)
        if decided:
            write_json(run.about, run.read_about() | decided)
        with (
            RunLog(run, every_steps=settings.training.log_every_steps, after_step=-1) as log,
            tracked(run, settings, fan_out(log, emit), after_step=-1) as both,
        ):
            for text in request.resolved.notices:
                both(Notice(text=text))
            return _train(
                run, settings, both, stop, lock, peers=peers, model_keys=request.resolved.model_keys
            )


def _files_of_start(request: TrainRequest, settings: Settings) -> dict[str, str]:
    """Return what a run's folder holds from the moment that it is there, by name; ``run.json`` comes last."""
    return {
        RunFolder.CONFIG: to_toml(settings),
        RunFolder.ORIGINS: json_text(dict(request.resolved.origins)),
        RunFolder.ABOUT: json_text(facts_of_start(request.command)),
    }


def _is_as_started(run: RunFolder, started: Mapping[str, str]) -> bool:
    """Tell whether a run was started with the same settings and says so."""
    is_whole = run.about.is_file() and run.origins.is_file() and run.config.is_file()
    return is_whole and run.config.read_text(encoding="utf-8", errors="replace") == started[RunFolder.CONFIG]


def _require_same_as_finished(run: RunFolder, settings: Settings, emit: EventSink, stop: StopFlag) -> None:
    """Make sure that a finished run is what was asked for.

    Raises:
        MismatchError: It was made with other settings, rows or weights.
    """
    materials = find_materials(settings, emit, stop, run=run)
    if list_checkpoints(run.checkpoints):
        compare(choose_checkpoint(run, None, emit), materials.fingerprints, is_finished=True)
        return
    compare_start(read_settings(run), settings, is_finished=True)
    compare_data(run, materials.fingerprints["data"])


def complete_already(run: RunFolder, settings: Settings, emit: EventSink, peers: Peers) -> TrainOutcome:
    """Say that a finished run is left as it is."""
    steps = [step_of(one) for one in list_checkpoints(run.checkpoints)]
    step = max(steps, default=max(1, settings.training.max_steps))
    peers.tell(Assignment(run=run, settings=settings, complete_at=step).to_json())
    emit(Notice(text=f"{run.name} is complete already: step {step}"))
    return outcome_of(run, settings, Ending.FINISHED, step, (None, None), seconds=0.0)


def start_over(
    run: RunFolder,
    settings: Settings,
    changes: Changes,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    peers: Peers,
    allowed: Sequence[str] = (),
) -> TrainOutcome:
    """Begin a run again that ended before its first checkpoint, as it was begun then. The caller holds the lock."""
    with (
        RunLog(run, every_steps=settings.training.log_every_steps, after_step=-1) as log,
        tracked(run, settings, fan_out(log, emit), after_step=-1) as both,
    ):
        both(Notice(text="no checkpoint yet: starting it over from its recorded settings"))
        record_start_over(run, changes, both)
        return _train(run, settings, both, stop, lock, peers=peers, allowed=allowed, changes=changes)


def continue_run(
    run: RunFolder,
    settings: Settings,
    checkpoint: Path,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    peers: Peers,
    allowed: Sequence[str] = (),
) -> TrainOutcome:
    """Train on from ``checkpoint``, which verifies; ``allowed`` may differ. The caller holds the lock."""
    step = step_of(checkpoint)
    with (
        RunLog(
            run,
            every_steps=settings.training.log_every_steps,
            after_step=step,
            owes_heldout=owes_heldout(checkpoint),
        ) as log,
        tracked(run, settings, fan_out(log, emit), after_step=step) as both,
    ):
        for text in log.repaired:
            both(Warned(text=text))
        return _train(run, settings, both, stop, lock, peers=peers, checkpoint=checkpoint, allowed=allowed)


def _train(
    run: RunFolder,
    settings: Settings,
    emit: EventSink,
    stop: StopFlag,
    lock: RunLock,
    *,
    peers: Peers,
    checkpoint: Path | None = None,
    model_keys: Mapping[str, object] | None = None,
    allowed: Sequence[str] = (),
    changes: Changes | None = None,
) -> TrainOutcome:
    changes = changes or Changes()
    begin = monotonic()
    watch = FitWatch(stops_early=settings.training.early_stopping_evals > 0)
    if checkpoint is not None:
        watch.replay(read_events(run))
    emit = watched(watch, emit)
    emit(RunStarted(run=run.name, path=str(run.path)))
    named = None if checkpoint is None else in_use(checkpoint)
    peers.tell(Assignment(run=run, settings=settings, checkpoint=named).to_json())
    start, starting = settings, stop
    materials = peers.first(lambda: find_materials(start, emit, starting, run=run))
    peers.agree_on(materials.identity)
    located, prepared, settings = materials.located, materials.prepared, materials.settings
    if checkpoint is None:
        compare_data(run, prepared.dataset.fingerprint, allowed=allowed)
    for text in model_differences(located.folder, model_keys or {}):
        emit(Warned(text=text))
    if checkpoint is not None:
        changes = compare(checkpoint, materials.fingerprints, allowed=allowed)
    recorded = read_decisions(run, checkpoint, emit).but(open_again(changes, settings.training))
    decided = settle_precision(recorded, settings.training.precision, choose_device())
    if checkpoint is not None:
        checkpoint = record_resume(run, checkpoint, changes, emit)
    peers.tell(decided.to_json())  # not before the checkpoint has its name: the others read it after this
    record_base(run, located)
    check_space(run, checkpoint_bytes(settings, located.folder), settings.checkpoint, emit)
    if materials.trusted_code:
        write_json(run.about, run.read_about() | {"trusted_code": dict(materials.trusted_code)})
    write_json(run.data, {"fingerprint": prepared.dataset.fingerprint, **prepared.dataset.about})
    built = build_for(
        run, materials, emit, peers.group, check_owner=lock.check, checkpoint=checkpoint, recorded=decided
    )
    agree_on_decisions(built, peers)
    record_decisions(run, built.decisions, emit)
    if not built.is_plain:
        record_need(run)
    trainer = built.trainer
    watch.name_rows = trainer.name_rows
    tell_sharing(trainer, emit)
    emit(Notice(text=rhythm_text(settings.checkpoint, settings.training.max_steps)))
    spikes = SpikeStop(stop=stop, watch=watch, settings=settings.training)
    ending = fit_together(trainer, run, spikes)
    ended_at = trainer.state.step
    if ending is not Ending.STOPPED:
        lock.check()
        peers.first(lambda: take_best(trainer, run, settings.training, emit))
        _save_final(run, materials, built, emit)
        end_taking_back(run)
    _report(run, emit)
    if ending is Ending.STOPPED:
        spikes.refuse_spoilt(run, ended_at)
    state = trainer.state
    losses = (state.first_heldout_loss, state.last_heldout_loss)
    outcome = replace(
        outcome_of(run, settings, ending, ended_at, losses, seconds=monotonic() - begin),
        last_heldout_step=state.last_heldout_step,
        heldout_rows=len(prepared.dataset.heldout),
        changed=changes.by_kind(),
        left_out=left_out(list(prepared.audit.values())),
    )
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
            weights=snapshot.weights,
            unchanged={name for name, weight in built.model.named_parameters() if not weight.requires_grad},
        )
    emit(ModelSaved(path=str(run.final), pt=pt))


def _report(run: RunFolder, emit: EventSink) -> None:
    try:
        write_report([run], run.report)
    except Exception as error:  # noqa: BLE001 - a page about the run must not take the run down
        emit(Warned(text=f"no report was written: {error}"))
