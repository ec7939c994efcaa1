"""Train and resume: builds the parts, runs the trainer, leaves a run folder behind."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

from sftcli import storage
from sftcli.config.resolve import Resolved, to_toml
from sftcli.config.schema.settings import Settings
from sftcli.data.prepared.about import RUN_ROWS, RunRows
from sftcli.data.quality.thresholds import left_out
from sftcli.events import (
    Ending,
    Notice,
    RunStarted,
    Session,
    Warned,
    fan_out,
)
from sftcli.modeling.formats.pt_file import model_differences
from sftcli.runtime import monotonic
from sftcli.services.diagnosis.monitor import FitWatch, watched
from sftcli.services.diagnosis.spike_stop import SpikeStop
from sftcli.services.diagnosis.verdict import Again
from sftcli.services.machine.kernels import kernels_as_set
from sftcli.services.models.base import record_base, record_need
from sftcli.services.processes.peers import Peers, joined, with_processes
from sftcli.services.processes.rank import find_place
from sftcli.services.runs.event_log import (
    RunLog,
    forgotten_if_unstarted,
    has_begun,
    is_unstarted,
    read_events,
)
from sftcli.services.runs.folder import (
    SETTING_ORIGINS,
    RunFolder,
    create_run,
    existing_run,
    read_settings,
)
from sftcli.services.runs.lock import RunLock
from sftcli.services.runs.record import RECORD
from sftcli.services.trackers.sink import tracked
from sftcli.services.train.budget import end_in_time, record_budget, spent_by
from sftcli.services.train.decisions import decide, record_decisions, record_machine
from sftcli.services.train.live_page import LivePage
from sftcli.services.train.resuming.changes import Changes, compare_start, open_again
from sftcli.services.train.resuming.compatibility import compare, compare_data
from sftcli.services.train.resuming.longer import end_text, require_steps_left
from sftcli.services.train.resuming.resume_point import (
    choose_checkpoint,
    clear_leftovers,
    end_taking_back,
    record_resume,
    record_start_over,
    rhythm_text,
)
from sftcli.services.train.run import TrainingRun, TrainOutcome, write_page
from sftcli.services.train.start.disk_space import check_space, checkpoint_bytes
from sftcli.services.train.start.inputs import find_inputs
from sftcli.services.train.start.open_settings import as_started, recalled, record
from sftcli.services.train.start.parallelism import check_sharing, tell_sharing
from sftcli.services.train.start.started import started
from sftcli.services.train.worker import assignment, run_worker
from sftcli.training.checkpoint.format import owes_heldout, read_stale_evals
from sftcli.training.checkpoint.names import list_checkpoints, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A new run. ``label`` starts its name if the settings give none; ``command`` is what the user typed."""

    resolved: Resolved
    label: str
    command: str
    auto: bool = False  # go on with the run of this name where there is one
    begun: float = field(default_factory=monotonic)  # when the command was


def run_training(request: TrainRequest, session: Session) -> TrainOutcome:
    """Start a new run and train it to its end, or until a stop is requested; with ``auto`` resume it if it exists.

    Raises:
        OutputError: The run exists and ``auto`` is not set, or another process trains it.
        StoppedError: A stop was asked for before the first step.
    """
    check_sharing(request.resolved.settings)
    with joined(find_place(os.environ), session.emit) as peers:
        if not peers.group.is_writer:
            return run_worker(peers, session.stop, asked=request.resolved.settings)
        return _lead(request, session, peers)


def _lead(request: TrainRequest, session: Session, peers: Peers) -> TrainOutcome:
    settings = with_processes(request.resolved.settings, peers)
    existing = existing_run(settings.run) if request.auto or is_unstarted(settings.run) else None
    is_new, is_named = existing is None, settings.run.name is not None
    started = _files_of_start(request, settings)
    agreed = settings if existing is None else recalled(settings, existing)
    folder = existing or create_run(settings.run, label=request.label, files=started)
    run = TrainingRun(folder=folder, settings=agreed, session=session, peers=peers, begun=request.begun)
    if existing is not None and folder.is_finished:
        _require_same_as_finished(run)
        return complete_already(run)
    with (
        RunLock(folder.path, session.emit) as lock,  # first: who does not get it removes nothing
        forgotten_if_unstarted(folder, session.emit, is_new=is_new, is_named=is_named),
    ):
        run.check_owner = lock.check
        clear_leftovers(folder, session.emit)
        if folder.about.is_file() and list_checkpoints(folder.checkpoints):
            run.checkpoint = choose_checkpoint(folder, None, session.emit)
            return continue_run(run)
        is_same = _is_as_started(folder, _files_of_start(request, as_started(agreed, folder)))
        if is_same and has_begun(folder):
            return start_over(run, Changes())
        run.settings = settings  # the rows may be others
        decided = folder.record().decisions if is_same else None
        storage.try_remove_tree(folder.data)  # of rows that may have been others
        storage.try_remove_tree(folder.earlier)
        for name, text in started.items():
            storage.replace_file(folder.path / name, text.encode())
        if decided is not None:
            folder.note(decisions=decided)
        with _logged(run) as (logged, watch):
            for text in request.resolved.notices:
                logged.session.emit(Notice(text=text))
            return _train(logged, watch, model_keys=request.resolved.model_keys)


def _files_of_start(request: TrainRequest, settings: Settings) -> dict[str, str]:
    """Return what a run's folder holds from the moment that it is there, by name; ``run.json`` comes last."""
    return {
        RunFolder.CONFIG: to_toml(settings),
        RunFolder.ORIGINS: SETTING_ORIGINS.text(dict(request.resolved.origins)),
        RunFolder.ABOUT: RECORD.text(started(request.command)),
    }


def _is_as_started(run: RunFolder, started: Mapping[str, str]) -> bool:
    """Return whether a run was started with the settings in the files ``started`` and says so."""
    is_whole = run.about.is_file() and run.origins.is_file() and run.config.is_file()
    return is_whole and run.config.read_text(encoding="utf-8", errors="replace") == started[RunFolder.CONFIG]


def _require_same_as_finished(run: TrainingRun) -> None:
    """Make sure that a finished run is what was asked for.

    Raises:
        MismatchError: It was made with other settings, rows or weights.
    """
    found = find_inputs(run.settings, run.session, run=run.folder).fingerprints
    if list_checkpoints(run.folder.checkpoints):
        compare(choose_checkpoint(run.folder, None, run.session.emit), found, finished=run.folder)
        return
    compare_start(read_settings(run.folder), run.settings, finished=run.folder)
    compare_data(run.folder, found["data"])


def complete_already(run: TrainingRun) -> TrainOutcome:
    """Report that a finished run is left unchanged."""
    steps = [step_of(one) for one in list_checkpoints(run.folder.checkpoints)]
    step = max(steps, default=max(1, run.settings.training.max_steps))
    run.peers.broadcast(assignment(run, complete_at=step))
    longer = f"to train it longer: sft resume {run.folder.argument} --max-steps {2 * step}"
    run.session.emit(Notice(text=f"{run.folder.name} is complete already: step {step}; {longer}"))
    return run.outcome(Ending.FINISHED, step)


def start_over(run: TrainingRun, changes: Changes, *, allowed: Sequence[str] = ()) -> TrainOutcome:
    """Start a run over that ended before its first checkpoint, with its recorded settings. The caller holds the lock."""
    with _logged(run) as (logged, watch):
        emit = logged.session.emit
        emit(Notice(text="no checkpoint yet: starting over from the recorded settings"))
        record_start_over(run.folder, changes, emit)
        return _train(logged, watch, changes=changes, allowed=allowed)


def continue_run(run: TrainingRun, *, allowed: Sequence[str] = ()) -> TrainOutcome:
    """Train on from the run's checkpoint, which verifies; ``allowed`` may differ. The caller holds the lock."""
    with _logged(run) as (logged, watch):
        return _train(logged, watch, allowed=allowed)


@contextmanager
def _logged(run: TrainingRun) -> Iterator[tuple[TrainingRun, FitWatch]]:
    """Yield ``run`` with a session that its log, its trackers and a watch on its curves hear; they know what was before."""
    settings, checkpoint = run.settings, run.checkpoint
    step = -1 if checkpoint is None else step_of(checkpoint)
    watch = FitWatch(
        again=Again(run=run.folder, settings=settings),
        stops_early=settings.training.early_stopping_evals > 0,
    )
    with (
        RunLog(
            run.folder,
            every_steps=settings.training.log_every_steps,
            after_step=step,
            owes_heldout=checkpoint is not None and owes_heldout(checkpoint),
        ) as log,
        tracked(
            run.folder, settings, fan_out(log, run.session.emit, LivePage(run.folder)), after_step=step
        ) as emit,
        kernels_as_set(settings.training, emit),
    ):
        if checkpoint is not None:
            for text in log.repaired:
                emit(Warned(text=text))
            watch.replay(read_events(run.folder))

        def check_before_publishing() -> None:
            run.check_owner()
            log.sync()

        session = Session(watched(watch, emit), run.session.stop)
        try:
            yield replace(run, session=session, check_owner=check_before_publishing), watch
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted at once: {saved_text(run.folder)}") from error


def saved_text(run: RunFolder) -> str:
    """Return what of a run that was ended at once is kept, and how it goes on."""
    steps = [step_of(one) for one in list_checkpoints(run.checkpoints)]
    kept = f"step {max(steps)} is saved" if steps else "no checkpoint was saved yet"
    how = "go on from there" if steps else "start it over"
    return f"{kept}; to {how}: sft resume {run.argument}"


def _train(
    run: TrainingRun,
    watch: FitWatch,
    *,
    changes: Changes | None = None,
    allowed: Sequence[str] = (),
    model_keys: Mapping[str, object] | None = None,
) -> TrainOutcome:
    folder, emit = run.folder, run.session.emit
    emit(RunStarted(run=folder.name, path=str(folder.path)))
    run.peers.broadcast(assignment(run))
    run.open()
    changes = _compared(run, changes or Changes(), allowed=allowed)
    step = 0 if run.checkpoint is None else step_of(run.checkpoint)
    if run.checkpoint is not None:
        stale = read_stale_evals(run.checkpoint)
        require_steps_left(folder, step, changes, run.settings.training, stale_evals=stale)
    for text in model_differences(run.inputs.located.folder, model_keys or {}):
        emit(Warned(text=text))
    training = run.settings.training
    decided = decide(folder, run.checkpoint, training, emit, reopened=open_again(changes, training))
    if run.checkpoint is not None:
        run.checkpoint = record_resume(folder, run.checkpoint, changes, emit)
    if stretched := end_text(step, changes, training):
        emit(Warned(text=stretched))
    run.peers.broadcast(
        decided.to_json()
    )  # not before the checkpoint has its name: the others read it after this
    _record_inputs(run)
    _tell_doubts(run)
    emit(Notice(text=f"Loading pretrained model from {run.inputs.located.folder}"))
    run.build(decided, is_verified=run.checkpoint is not None)  # who chose it has verified it
    record_decisions(folder, run.parts.decisions, emit)
    record_machine(folder, run.parts.decisions, training)
    with run.memory_errors():
        budget = end_in_time(run)
    if budget is not None:
        record(folder, run.inputs.decided)
        record_budget(run, budget)
        _tell_doubts(run)
        training = run.settings.training
    if not run.parts.is_plain:
        record_need(folder)
    watch.name_rows = run.trainer.name_rows
    watch.again = Again(run=folder, settings=run.inputs.decided.settings)
    tell_sharing(run.trainer, emit)
    emit(Notice(text=rhythm_text(run.settings.checkpoint, training.max_steps)))
    spikes = SpikeStop(stop=run.session.stop, watch=watch, settings=training)
    ending = run.fit(spikes)
    ended_at = run.trainer.state.step
    if ending.is_complete:
        run.keep_best()
        run.save()
        end_taking_back(folder)
    write_page(folder, emit)
    if not ending.is_complete:
        spikes.refuse_spoilt(folder, ended_at)
    outcome = replace(
        _outcome(run, changes, ending, ended_at), spent=spent_by(run, budget), seconds=monotonic() - run.begun
    )
    if not ending.is_complete:
        return outcome
    return replace(outcome, verdict=watch.verdict(run.trainer.state.step), earlier=tuple(watch.kept))


def _tell_doubts(run: TrainingRun) -> None:
    """Tell a new run what can hardly come out well, once its steps are known."""
    if run.checkpoint is None and run.settings.training.max_minutes is None:
        again = Again(run=run.folder, settings=run.settings)
        run.inputs.tell_doubts(run.session.emit, with_replay=again.command(again.more_replay()))


def _compared(run: TrainingRun, changes: Changes, *, allowed: Sequence[str]) -> Changes:
    """Return what differs from the run's checkpoint; of a run without one, ``changes``.

    Raises:
        MismatchError: What may not.
    """
    found = run.inputs.fingerprints
    if run.checkpoint is not None:
        return compare(run.checkpoint, found, allowed=allowed)
    compare_data(run.folder, found["data"], allowed=allowed)
    return changes


def _record_inputs(run: TrainingRun) -> None:
    """Write into the run's folder what it trains on, where its disk has room for what it will write."""
    folder, settings, inputs = run.folder, run.settings, run.inputs
    record_base(folder, inputs.located)
    if inputs.earlier is not None:
        folder.note(lineage=inputs.earlier.lineage)
    record(folder, inputs.decided)
    check_space(
        folder, checkpoint_bytes(settings, inputs.located.folder), settings.checkpoint, run.session.emit
    )
    if inputs.trusted_code:
        folder.note(trusted_code=dict(inputs.trusted_code))
    dataset = inputs.prepared.dataset
    values = {one.name: getattr(dataset.about, one.name) for one in fields(dataset.about)}
    RUN_ROWS.write(folder.data, RunRows(fingerprint=dataset.fingerprint, **values))


def _outcome(run: TrainingRun, changes: Changes, ending: Ending, step: int) -> TrainOutcome:
    state, prepared = run.trainer.state, run.inputs.prepared
    return replace(
        run.outcome(ending, step),
        first_heldout_loss=state.first_heldout_loss,
        last_heldout_loss=state.last_heldout_loss,
        last_heldout_step=state.last_heldout_step,
        heldout_rows=len(prepared.dataset.heldout),
        measure=run.trainer.answer.measure if run.trainer.answer and state.asks else "",
        first_score=state.first_score,
        last_score=state.last_score,
        changed=changes.by_kind(),
        left_out=left_out(list(prepared.audit.values())),
    )
