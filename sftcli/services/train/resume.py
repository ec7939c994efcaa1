"""Resume a run, or verify that a resumed run reproduces its checkpoints."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sftcli.config.layers import Override
from sftcli.errors import NotFoundError, StoppedError
from sftcli.events import Notice, Session
from sftcli.services.machine.kernels import kernels_as_set, why_not_equal
from sftcli.services.processes.peers import Peers, joined, with_processes
from sftcli.services.processes.rank import find_place
from sftcli.services.runs.folder import find_recorded, read_settings
from sftcli.services.runs.lock import RunLock
from sftcli.services.runs.record import Decisions
from sftcli.services.train.decisions import decide
from sftcli.services.train.lead import (
    complete_already,
    continue_run,
    start_over,
)
from sftcli.services.train.resuming.changes import SETTING, check_may_change, compare_start, open_again
from sftcli.services.train.resuming.compatibility import compare
from sftcli.services.train.resuming.kept import pair_to_verify
from sftcli.services.train.resuming.longer import asks_longer
from sftcli.services.train.resuming.resume_point import (
    choose_checkpoint,
    clear_leftovers,
    count_equal,
)
from sftcli.services.train.run import TrainingRun, TrainOutcome
from sftcli.services.train.start.parallelism import check_sharing
from sftcli.services.train.worker import run_worker
from sftcli.training.checkpoint.format import read_fingerprints, read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.distributed.agreed_stop import AgreedStop


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """Resume ``run``, or the newest unfinished one under ``root``; from ``step``, or the newest checkpoint."""

    root: Path
    run: str | None = None
    step: int | None = None
    overrides: Sequence[Override] = ()
    allowed: Sequence[
        str
    ] = ()  # settings keys, or ``data``, that may differ from what the run was started with
    break_lock: bool = False  # the user says that whoever holds the lock is dead


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOutcome:
    """Steps after ``first`` were replayed up to ``second``, and ``tensors`` tensors were equal bit for bit."""

    run: str
    first: int
    second: int
    tensors: int
    machine: Mapping[str, tuple[str, str]] = field(
        default_factory=dict
    )  # that differs: name -> what it was and is


def resume_training(request: ResumeRequest, session: Session) -> TrainOutcome:
    """Resume a run as if it had never stopped. A finished run is left unchanged, unless it is given another end.

    Raises:
        NotFoundError: No such run, or no such checkpoint; without any, it is started over.
        DataError: No checkpoint is whole, or the one asked for is not.
        MismatchError: Settings, data, tokenizer or model are not what the run was started with.
        OutputError: Another process trains it.
    """
    check_may_change(request.allowed)
    with joined(find_place(os.environ), session.emit) as peers:
        if not peers.group.is_writer:
            return run_worker(peers, session.stop)
        return _lead(request, session, peers)


def _lead(request: ResumeRequest, session: Session, peers: Peers) -> TrainOutcome:
    recorded = find_recorded(request.run, request.root, request.overrides)
    check_sharing(recorded.settings)
    folder, emit = recorded.run, session.emit
    run = TrainingRun(
        folder=folder, settings=with_processes(recorded.settings, peers), session=session, peers=peers
    )
    if folder.is_finished and request.step is None and not asks_longer(recorded, request.allowed):
        return complete_already(run)
    with RunLock(folder.path, emit, break_lock=request.break_lock) as lock:
        run.check_owner = lock.check
        clear_leftovers(folder, emit)
        if request.step is None and not list_checkpoints(folder.checkpoints):
            if folder.is_finished:
                raise NotFoundError(
                    f"{folder.name} has no checkpoint to train on from",
                    hint=f"start a new run from its model: sft train --model {folder.argument}",
                )
            changes = compare_start(recorded.has, recorded.settings, allowed=request.allowed)
            return start_over(run, changes, allowed=request.allowed)
        run.checkpoint = choose_checkpoint(folder, request.step, emit)
        return continue_run(run, allowed=(*request.allowed, *recorded.accepted))


def verify_resume(request: ResumeRequest, session: Session) -> VerifyOutcome:
    """Replay the steps between two checkpoints of a run and compare the results. Writes nothing.

    Raises:
        NotFoundError: The run has no two checkpoints.
        MismatchError: The replay ended elsewhere.
    """
    with joined(
        find_place(os.environ), session.emit
    ) as peers:  # all of several do the same, and the first one talks
        return _verify(request, session, peers)


def _verify(request: ResumeRequest, session: Session, peers: Peers) -> VerifyOutcome:
    recorded = find_recorded(request.run, request.root, (), finished=None)
    first, second = pair_to_verify(recorded.run, request.step)
    known = read_fingerprints(second)
    of_second = [
        Override(key=key, value=json.loads(known[SETTING + key]), origin=second.name)
        for key in recorded.accepted
        if SETTING + key in known
    ]
    run = TrainingRun(
        folder=recorded.run,
        settings=with_processes(read_settings(recorded.run, of_second), peers),
        session=session,
        peers=peers,
        checkpoint=first,
    )
    emit = session.emit
    emit(Notice(text=f"replaying steps {step_of(first) + 1} to {step_of(second)} of {run.folder.name}"))
    with kernels_as_set(run.settings.training, emit):
        return _replayed(run, first, second, allowed=recorded.accepted)


def _replayed(run: TrainingRun, first: Path, second: Path, *, allowed: Sequence[str]) -> VerifyOutcome:
    """Take the steps between two checkpoints, and compare what comes out with the second.

    Raises:
        MismatchError: It is something else.
    """
    session, peers, emit = run.session, run.peers, run.session.emit
    run.open()
    changes = compare(first, run.inputs.fingerprints, allowed=allowed)
    for event in changes.message():
        emit(event)
    training = run.settings.training
    decided = peers.share(
        lambda: decide(run.folder, first, training, emit, reopened=open_again(changes, training)).to_json()
    )
    emit(Notice(text=f"Loading pretrained model from {run.inputs.located.folder}"))
    run.build(Decisions.from_json(decided, where=str(run.folder.about)))
    agreed = AgreedStop(stop=session.stop, group=peers.group)
    with run.memory_errors():
        while run.trainer.state.step < step_of(second):
            if agreed.requested():
                raise StoppedError
            emit(run.trainer.take_step())
    compared = count_equal(
        run.trainer.snapshot(),
        read_snapshot(second),
        name=second.name,
        why_other=why_not_equal(training, run.trainer.device),
        group=peers.group,
    )
    return VerifyOutcome(
        run=run.folder.name,
        first=step_of(first),
        second=step_of(second),
        tensors=compared,
        machine=changes.machine,
    )
