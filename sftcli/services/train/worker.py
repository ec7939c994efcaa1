"""What those processes of a training do that neither write nor talk."""

from pathlib import Path

from sftcli.config.auto import is_open
from sftcli.config.schema.settings import Settings
from sftcli.errors import MismatchError
from sftcli.events import Ending, Session, StopFlag, unheard
from sftcli.services.machine.kernels import kernels_as_set
from sftcli.services.processes.peers import Peers, with_processes
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Decisions
from sftcli.services.train.budget import end_in_time
from sftcli.services.train.run import TrainingRun, TrainOutcome
from sftcli.training.checkpoint.names import in_use


def assignment(run: TrainingRun, *, complete_at: int = 0) -> dict[str, object]:
    """Return the message of rank 0 to the others as JSON: train ``run``, or nothing, as it is complete at a step."""
    return {
        "run": str(run.folder.path.absolute()),
        "settings": run.settings.model_dump_json(),
        "checkpoint": str(in_use(run.checkpoint).absolute()) if run.checkpoint else "",
        "complete_at": complete_at,
    }


def run_worker(peers: Peers, stop: StopFlag, *, asked: Settings | None = None) -> TrainOutcome:
    """Take part in the training that rank 0 leads; ``asked`` is what this process was started with, if stated.

    Raises:
        MismatchError: It was started with something else.
    """
    task = peers.receive(stop)
    run = TrainingRun(
        folder=RunFolder(Path(str(task["run"]))),
        settings=Settings.model_validate_json(str(task["settings"])),
        session=Session(unheard, stop),
        peers=peers,
        checkpoint=Path(str(task["checkpoint"])) if task["checkpoint"] else None,
    )
    if asked is not None:
        _require_same(with_processes(asked, peers), run.settings, rank=peers.group.rank)
    if complete_at := int(str(task["complete_at"])):
        return run.outcome(Ending.FINISHED, complete_at)
    with kernels_as_set(run.settings.training, unheard):
        return _train(run)


def _train(run: TrainingRun) -> TrainOutcome:
    peers, stop = run.peers, run.session.stop
    run.open()
    run.build(Decisions.from_json(peers.receive(stop), where="the first process"))
    with run.memory_errors():
        end_in_time(run)
    ending = run.fit(stop)
    ended_at = run.trainer.state.step
    if ending.is_complete:
        run.keep_best()
        run.save()
    return run.outcome(ending, ended_at)


def _require_same(own: Settings, led: Settings, *, rank: int) -> None:
    ours, theirs = own.model_dump(mode="json"), led.model_dump(mode="json")
    for section, values in ours.items():
        for key, value in values.items():
            if is_open(own, f"{section}.{key}"):
                continue  # the first process may know what its run decided
            if value != theirs[section][key]:
                raise MismatchError(
                    f"process {rank} was started with {section}.{key} {value}, but process 0 with {theirs[section][key]}",
                    hint="processes that a launcher starts together share one training, with one command line; several "
                    "trainings under srun are steps of their own: srun --ntasks=1",
                )
