"""What was measured or tried when a run started and moves its numbers: decided once, recorded, and taken from there on resume."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import MismatchError, ResourceError
from sftcli.events import EventSink, NeverStop, Notice, Warned
from sftcli.runtime import choose_device, dtype_named
from sftcli.services.machine.facts import facts_of_run
from sftcli.services.machine.precision import decide_precision
from sftcli.services.processes.peers import Peers
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Decisions
from sftcli.training.checkpoint.format import read_fingerprints

_NOT_HELD = frozenset({"precision_why", "kernel"})  # what a run may go on without
_OLDER_PRECISION = "machine precision of products"  # what checkpoints of older runs call it

# The settings that ask for a decision: where the user lets one of them differ, it is made anew.
ASKED_BY = {
    "precision": frozenset({"training.precision"}),
    "precision_why": frozenset({"training.precision"}),
    "weights": frozenset({"training.parallel", "training.shard_processes", "processes"}),
    "attention": frozenset({"model.attention"}),
    "layers": frozenset({"model.attention", "training.compile"}),
    "packing": frozenset({"training.packing", "training.neftune_alpha", "model.attention"}),
    "kernel": frozenset(
        {"training.packing", "training.neftune_alpha", "model.attention", "training.precision"}
    ),
}


def read_decisions(run: RunFolder, checkpoint: Path | None, emit: EventSink) -> Decisions:
    """Return the decisions of ``run``; for an older run that recorded fewer, those in its ``checkpoint``.

    Raises:
        DataError: ``run.json`` holds something else there.
    """
    recorded = run.record().decisions if run.about.is_file() else None
    if recorded is not None:
        return recorded
    if checkpoint is None:
        return Decisions()
    precision = read_fingerprints(checkpoint).get(_OLDER_PRECISION)
    known = f"only that it runs in {precision}" if precision else "nothing"
    emit(
        Notice(
            text=f"run {run.name} is from an older version and records {known}: attention, faster layers and packing are decided again"
        )
    )
    return Decisions.from_json({"precision": precision}, where=str(checkpoint))


def but(recorded: Decisions, changed: Collection[str]) -> Decisions:
    """Return ``recorded`` without the decisions that the settings ``changed`` reopen."""
    reopened = [name for name, keys in ASKED_BY.items() if keys & set(changed)]
    return replace(recorded, **dict.fromkeys(reopened))


def decide(
    run: RunFolder,
    checkpoint: Path | None,
    settings: TrainingSettings,
    emit: EventSink,
    *,
    reopened: Collection[str] = (),
) -> Decisions:
    """Return what ``run`` has decided, its precision settled; open is what ``reopened`` asks for, names as in ``open_again``."""
    recorded = but(read_decisions(run, checkpoint, emit), reopened)
    return settle_precision(recorded, settings.precision, choose_device())


def settle_precision(recorded: Decisions, setting: str, device: torch.device) -> Decisions:
    """Return ``recorded`` with a precision, decided by the setting ``training.precision`` where that is open.

    Raises:
        ResourceError: ``device`` cannot multiply in it.
    """
    if recorded.precision is None:
        decided = decide_precision(setting, device)
        return replace(recorded, precision=decided.name, precision_why=decided.why)
    try:
        dtype_named(recorded.precision, device)
    except ResourceError as error:
        raise ResourceError(
            f"the run trains in {recorded.precision}, and {error.message}",
            hint="resume it on a device like the one it started on, or accept other numbers from here on: "
            "--set training.precision=fp32 --allow-change training.precision",
        ) from error
    return replace(recorded, precision_why="as at the start of the run")


def record_decisions(run: RunFolder, decisions: Decisions, emit: EventSink) -> None:
    """Write into ``run.json`` what was decided, before the first step that depends on it.

    Another sharing of the weights or another kernel of attention, which a run may go on with, is told.
    """
    before, made = run.record().decisions, decisions
    told = []
    if before is not None and before.weights not in {None, decisions.weights}:
        told.append(f"weights of the processes were {before.weights}, are {decisions.weights}")
    if before is not None and before.kernel not in {None, decisions.kernel}:
        told.append(f"attention was computed {before.kernel!r}, is {decisions.kernel!r}")
    for text in told:
        emit(Warned(text=f"{text}: the run continues, but not bit for bit as before"))
    if before is not None and before.precision == decisions.precision:
        made = replace(decisions, precision_why=before.precision_why)  # of the start, which decided it
    if before != made:
        run.note(decisions=made)


def record_machine(run: RunFolder, decisions: Decisions, settings: TrainingSettings) -> None:
    """Write into ``run.json`` on what this start trains, and with which attention."""
    machine = facts_of_run(settings) | {"attention": decisions.kernel or "not known"}
    if run.record().machine != machine:
        run.note(machine=machine)


def require_same(recorded: Decisions, made: Decisions, *, what: str) -> None:
    """Make sure that what is recorded was decided again.

    Raises:
        MismatchError: Something else was.
    """
    wanted, found = recorded.to_json(), made.to_json()
    other = [name for name in wanted if wanted[name] not in (None, found[name]) and name not in _NOT_HELD]
    if other:
        shown = "; ".join(f"{name} was {_shown(wanted[name])}, is {_shown(found[name])}" for name in other)
        raise MismatchError(
            f"{what} cannot run here as it was decided at the start: {shown}",
            hint="resume it on the machine and with the library versions it started with",
        )


def agree_on_decisions(made: Decisions, peers: Peers) -> None:
    """Make sure that all processes have decided the same.

    Raises:
        MismatchError: This one has not.
    """
    if peers.group.is_writer:
        peers.broadcast(made.to_json())
        return
    first = Decisions.from_json(peers.receive(NeverStop()), where="the first process")
    require_same(first, made, what=f"the run in process {peers.group.rank}")


def _shown(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
