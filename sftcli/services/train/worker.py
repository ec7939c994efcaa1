"""What every process of a training does, and all that those do which neither write nor talk."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.settings import Settings
from sftcli.errors import MismatchError, ResourceError, StoppedError
from sftcli.events import Ending, Event, EventSink, NeverStop, Notice, StopFlag, Warned
from sftcli.runtime import seed_everything
from sftcli.services.processes.peers import Peers, with_processes
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.build import Built, Materials, build_trainer
from sftcli.services.train.decisions import Decisions, require_same
from sftcli.services.train.inputs import find_materials
from sftcli.services.train.outcome import TrainOutcome, outcome_of, take_best
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.distributed.group import Group
from sftcli.training.out_of_memory import is_out_of_memory
from sftcli.training.random_streams import start_stream
from sftcli.training.trainer import Trainer


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


def follow(peers: Peers, stop: StopFlag, *, asked: Settings | None = None) -> TrainOutcome:
    """Take part in the training that the first process leads; ``asked`` is what this one was started with, if it says.

    Raises:
        MismatchError: It was started with something else.
    """
    task = Assignment.from_json(peers.hear(stop))
    run = task.run
    if asked is not None:
        _require_same(with_processes(asked, peers), task.settings, rank=peers.group.rank)
    if task.complete_at:
        return outcome_of(run, task.settings, Ending.FINISHED, task.complete_at, (None, None), seconds=0.0)
    materials = peers.first(lambda: find_materials(task.settings, _silent, stop, run=run), stop)
    peers.agree_on(materials.identity)
    decided = Decisions.from_json(peers.hear(stop), where="the first process")
    built = build_for(
        run,
        materials,
        _silent,
        peers.group,
        check_owner=lambda: None,
        checkpoint=task.checkpoint,
        recorded=decided,
    )
    agree_on_decisions(built, peers)
    trainer, settings = built.trainer, materials.settings
    ending = fit_together(trainer, run, stop)
    ended_at = trainer.state.step
    if ending is not Ending.STOPPED:
        peers.first(lambda: take_best(trainer, run, settings.training, _silent))
        trainer.snapshot()  # all processes have a part in it
    return outcome_of(run, settings, ending, ended_at, (None, None), seconds=0.0)


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


def build_for(
    run: RunFolder,
    materials: Materials,
    emit: EventSink,
    group: Group,
    *,
    check_owner: Callable[[], None],
    checkpoint: Path | None,
    recorded: Decisions,
) -> Built:
    """Return the trainer of a run as it stands at its start or at ``checkpoint``, with what is ``recorded`` of it."""
    emit(Notice(text=f"Loading pretrained model from {materials.located.folder}"))
    seed = materials.settings.training.seed
    seed_everything(seed)
    built = build_trainer(run, materials, emit, check_owner=check_owner, group=group, recorded=recorded)
    start_stream(group, seed=seed)
    if checkpoint is not None:
        built.trainer.restore(read_snapshot(checkpoint))
    return built


def agree_on_decisions(built: Built, peers: Peers) -> None:
    """Make sure that all processes have decided the same.

    Raises:
        MismatchError: This one has not.
    """
    if peers.group.is_writer:
        peers.tell(built.decisions.to_json())
        return
    first = Decisions.from_json(peers.hear(NeverStop()), where="the first process")
    require_same(first, built.decisions, what=f"the run in process {peers.group.rank}")


def fit_together(trainer: Trainer, run: RunFolder, stop: StopFlag) -> Ending:
    """Train until the end, or until ``stop`` is set in any of the processes.

    Raises:
        ResourceError: Memory ran out.
        StoppedError: It was set before the first step.
    """
    resume_command = f"sft resume {run.argument}"
    with memory_errors(trainer.tried, resume_command=resume_command, way_down=trainer.way_down):
        ending = trainer.fit(stop)
    if not trainer.state.step:
        raise StoppedError
    return ending


def tell_sharing(trainer: Trainer, emit: EventSink) -> None:
    """Say how several processes share a step, and where some of them have nothing to do."""
    size, passes = trainer.group.size, len(trainer.plan.window(trainer.state.step))
    if size > 1:
        what = "each step and the weights, and" if trainer.weights.are_shared_out else "each step and"
        emit(Notice(text=f"{size} processes share {what} sum their gradients once"))
    if passes < size:
        emit(
            Warned(
                text=f"a step has {passes} passes for {size} processes, so some do nothing: lower training.micro_batch_size "
                "or training.micro_batch_tokens, or raise training.batch_size"
            )
        )


def _silent(event: Event, /) -> None:
    """Take an event that the first process shows."""


@contextmanager
def memory_errors(
    tried: Callable[[], str], *, resume_command: str, way_down: Callable[[], str] = str
) -> Iterator[None]:
    """Turn running out of memory inside the block into an error with flags, the one that costs no quality first.

    Args:
        tried: Returns in words with what it ran out, such as "micro-batches of 4 rows".
        resume_command: Goes on with the run.
        way_down: Returns the setting that goes on with less memory, such as "training.micro_batch_size=2", where there is one.

    Raises:
        ResourceError: Memory ran out; checkpoints are intact.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        setting = way_down()
        smaller = f"{resume_command} --set {setting} --allow-change {setting.partition('=')[0]}"
        raise ResourceError(
            f"out of memory with {tried()}; checkpoints are intact",
            hint=(f"go on in smaller steps of the same updates: {smaller}; or " if setting else "")
            + "in a new run lower training.micro_batch_size, or training.micro_batch_tokens where that is set (the updates stay "
            "the same), set "
            "training.gradient_checkpointing, choose training.optimizer=adafactor, lower data.max_tokens, or choose a "
            f"smaller model; where something else took the memory: {resume_command}",
        ) from error
