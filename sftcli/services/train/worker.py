"""What those processes of a training do that neither write nor talk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.settings import Settings
from sftcli.errors import MismatchError
from sftcli.events import Ending, Event, Session, StopFlag
from sftcli.services.processes.peers import Peers, with_processes
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.decisions import Decisions
from sftcli.services.train.outcome import TrainOutcome, outcome_of
from sftcli.services.train.run import TrainingRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the first process tells the others to do: train ``run``, from ``checkpoint`` on; or nothing, it is complete."""

    run: RunFolder
    settings: Settings
    checkpoint: Path | None = None
    complete_at: int = 0  # step

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return {
            "run": str(self.run.path.absolute()),
            "settings": self.settings.model_dump_json(),
            "checkpoint": str(self.checkpoint.absolute()) if self.checkpoint else "",
            "complete_at": self.complete_at,
        }

    @staticmethod
    def from_json(told: Mapping[str, object]) -> "Assignment":
        """Return what ``to_json`` was made of."""
        return Assignment(
            run=RunFolder(Path(str(told["run"]))),
            settings=Settings.model_validate_json(str(told["settings"])),
            checkpoint=Path(str(told["checkpoint"])) if told["checkpoint"] else None,
            complete_at=int(str(told["complete_at"])),
        )


def run_worker(peers: Peers, stop: StopFlag, *, asked: Settings | None = None) -> TrainOutcome:
    """Take part in the training that the first process leads; ``asked`` is what this one was started with, if it says.

    Raises:
        MismatchError: It was started with something else.
    """
    task = Assignment.from_json(peers.hear(stop))
    if asked is not None:
        _require_same(with_processes(asked, peers), task.settings, rank=peers.group.rank)
    if task.complete_at:
        return outcome_of(
            task.run, task.settings, Ending.FINISHED, task.complete_at, (None, None), seconds=0.0
        )
    run = TrainingRun(
        folder=task.run,
        settings=task.settings,
        session=Session(_silent, stop),
        peers=peers,
        checkpoint=task.checkpoint,
    )
    run.open()
    run.build(Decisions.from_json(peers.hear(stop), where="the first process"))
    ending = run.fit(stop)
    ended_at = run.trainer.state.step
    if ending is not Ending.STOPPED:
        run.keep_best()
        run.save()
    return outcome_of(run.folder, run.settings, ending, ended_at, (None, None), seconds=0.0)


def _require_same(own: Settings, led: Settings, *, rank: int) -> None:
    ours, theirs = own.model_dump(mode="json"), led.model_dump(mode="json")
    for section, values in ours.items():
        for key, value in values.items():
            if value != theirs[section][key]:
                raise MismatchError(
                    f"process {rank} was started with {section}.{key} {value}, and process 0 with {theirs[section][key]}",
                    hint="processes that a launcher starts together share one training, with one command line; several "
                    "trainings under srun are steps of their own: srun --ntasks=1",
                )


def _silent(event: Event, /) -> None:
    """Take an event that the first process shows."""
