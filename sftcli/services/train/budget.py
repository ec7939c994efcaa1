"""Time as the end of a training: how many steps fit, counted once from measured ones, and what was used of it."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time

from sftcli import storage
from sftcli.config.auto import ORIGIN
from sftcli.config.schema.settings import Settings
from sftcli.errors import Location, StoppedError, UsageError
from sftcli.events import EventSink, Notice, Progressed, Warned
from sftcli.figures import duration, whole_duration
from sftcli.runtime import monotonic
from sftcli.services.runs.record import TIME, Budget
from sftcli.services.train.run import Spent, TrainingRun, write_page
from sftcli.services.train.start.disk_space import checkpoint_bytes
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.distributed.agreed_stop import AgreedStop
from sftcli.training.probes.pace import TimedStep, leaving_nothing, step_seconds, time_steps
from sftcli.training.state import CheckpointStore

STEPS, EPOCHS = "training.max_steps", "training.epochs"
LEEWAY = 1.1  # of the time that is named as the least, which is measured again
RESERVE = 0.05  # of the time, for steps that turn out slower than those measured
# A first step, then so many others: more of them where they cost little of the time, fewer where they cost much.
FEWEST, USUAL, MOST = 2, 4, 16
CHEAP, DEAR = 0.03, 0.1  # of the time
EXIT_SECONDS, MOST_SLOWNESS = 0.8, 10.0  # of an interpreter with torch in it, where it has a core of its own
_PART_BYTES = 32 * 2**20  # that are written to learn how fast the disk is


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds that the parts of a training take: all before its first step, a step, an evaluation, a save, and its end."""

    start: float
    step: float
    evaluation: float
    save: float
    end: float = 0.0  # the page about it, and the end of the process

    def seconds(self, steps: int, settings: Settings, *, evaluations: int) -> float:
        """Return what a training of ``steps`` steps takes from its start to its end."""
        work = self.start + self.end + steps * self.step + evaluations * self.evaluation
        return work + _waited_saves(settings, steps, work) * self.save


def evaluations_of(settings: Settings, steps: int, heldout_rows: int) -> int:
    """Return how often held-out rows are scored in a training of ``steps`` steps; the first time before them."""
    every = settings.training.eval_every_steps
    return 1 + (-(-steps // every) if every else 1) if heldout_rows else 0


def save_seconds(inputs: TrainingInputs, root: Path, store: CheckpointStore) -> float:
    """Return about what a checkpoint takes to write and to read back below ``root``: its small files, and a part of the tensors."""
    size = checkpoint_bytes(inputs.settings, inputs.located.folder)
    part = max(1, min(size, _PART_BYTES))
    with storage.scratch_folder(storage.nearest_folder(root), hint="choose another --runs") as folder:
        begin = monotonic()
        storage.write_file(folder / "part", [bytes(part)])
        storage.file_sha256(folder / "part")
        tensors = (monotonic() - begin) * size / part
        begin = monotonic()
        if isinstance(store, DirectoryCheckpointStore):
            store.write_model_files(folder)
        return tensors + monotonic() - begin


def count_steps(pace: Pace, inputs: TrainingInputs, *, minutes: float, end: tuple[str, int] | None) -> Budget:
    """Return how many steps fit into ``minutes``; ``end`` is the key that may end the training before, and its steps.

    Raises:
        UsageError: Not one fits.
    """
    settings, rows = inputs.settings, len(inputs.prepared.dataset.heldout)
    seconds = 60 * minutes

    def needed(steps: int) -> float:
        return pace.seconds(steps, settings, evaluations=evaluations_of(settings, steps, rows))

    most = int(seconds / pace.step) + 1
    allowed = bisect_right(range(1, most + 1), (1 - RESERVE) * seconds, key=needed)
    if not allowed:
        least = LEEWAY * needed(1) / (1 - RESERVE)
        raise UsageError(
            f"{whole_duration(seconds)} is too short: a training of one step takes about {whole_duration(needed(1))} here, "
            f"{duration(pace.start)} of them before that step",
            hint=f"the least that would do for one step: --max-time {whole_duration(math.ceil(least))}",
            location=Location(key=TIME),
        )
    key, steps = end if end is not None and end[1] <= allowed else (TIME, allowed)
    return Budget(
        seconds=seconds,
        steps=steps,
        allowed=allowed,
        decided_by=key,
        reserve_seconds=RESERVE * seconds,
        expected_seconds=needed(steps),
        step_seconds=pace.step,
        evaluation_seconds=pace.evaluation,
        save_seconds=pace.save,
    )


def other_end(inputs: TrainingInputs, origins: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the key beside the time that somebody chose for the end of a training, and the steps that it makes."""
    if inputs.decided.settings.training.max_steps:
        return STEPS, inputs.settings.training.max_steps
    is_chosen = not origins.get(EPOCHS, "").startswith(ORIGIN)
    return (EPOCHS, inputs.settings.training.max_steps) if is_chosen else None


def end_in_time(run: TrainingRun) -> Budget | None:
    """Turn the time that a run may take into steps, in each of its processes; None where it is given none.

    Held-out rows are scored first, as they are before the first step in any case.

    Raises:
        UsageError: Not one step fits, or fewer than the warm-up has.
        StoppedError: A stop was asked for meanwhile.
    """
    minutes, trainer = run.settings.training.max_minutes, run.trainer
    if minutes is None:
        return None
    stop = AgreedStop(stop=run.session.stop, group=trainer.group)
    begin = monotonic()
    trainer.measure_heldout(stop)
    evaluation, guess = monotonic() - begin, run.settings.training.max_steps

    def enough(taken: Sequence[TimedStep]) -> bool:
        run.session.emit(Progressed(task="measuring", done=min(len(taken), USUAL), total=USUAL, unit="steps"))
        spent = sum(step.seconds for step in taken) / (60 * minutes)
        fewest = FEWEST if spent >= DEAR else USUAL if spent >= CHEAP else MOST
        return len(taken) >= fewest

    with leaving_nothing(trainer):
        taken = time_steps(trainer, last_step=guess, enough=enough, stop=stop)
    if stop.requested():
        raise StoppedError

    def counted() -> dict[str, object]:
        step = step_seconds(trainer, taken, last_step=guess)
        save = save_seconds(run.inputs, run.folder.path, trainer.store)
        end_of_all = _end_seconds(run)
        first = evaluation if trainer.heldout_loss else 0.0  # which is over, and counted with the others
        pace = Pace(
            start=monotonic() - run.begun - first, step=step, evaluation=first, save=save, end=end_of_all
        )
        end = other_end(run.inputs, run.folder.first_origins())
        return asdict(count_steps(pace, run.inputs, minutes=minutes, end=end))

    budget = Budget(**run.peers.share(counted))  # type: ignore[arg-type]
    run.end_at(budget.steps, budget.origin)
    return budget


def _end_seconds(run: TrainingRun) -> float:
    """Return what comes after the final model: the page, which is written once now, and the end of the process.

    The process ends as much slower as it has run slower than its processor time says.
    """
    begin = monotonic()
    write_page(run.folder, run.session.emit)
    slowness = (monotonic() - run.begun) / max(0.1, process_time())
    return monotonic() - begin + EXIT_SECONDS * max(1.0, min(slowness, MOST_SLOWNESS))


def record_budget(run: TrainingRun, budget: Budget) -> None:
    """Write what was counted into the run's folder, and tell it."""
    emit, folder = run.session.emit, run.folder
    folder.note(budget=budget)
    passes = run.trainer.plan.epoch(budget.steps)
    emit(Notice(text=budget.in_words(passes)))
    usual = run.inputs.decided.settings.training.epochs
    if budget.decided_by == TIME and usual is not None and passes > 2 * usual:
        emit(
            Warned(
                text=f"{passes:.2g} passes over the rows are many, {usual:g} are usual; to end after those: --epochs {usual:g}"
            )
        )


def spent_by(run: TrainingRun, budget: Budget | None) -> Spent | None:
    """Return what a run has spent until now, recorded where it was given a time; None where it was given no time and no price."""
    price, seconds = run.settings.run.price_per_hour, monotonic() - run.begun
    if budget is None and price is None:
        return None
    if budget is not None:
        folder = run.folder
        folder.note(budget=replace(budget, used_seconds=seconds))
        _tell_over(budget, seconds, run.session.emit)
    return Spent(
        seconds=seconds,
        of_seconds=None if budget is None else budget.seconds,
        price=price_of(seconds, price),
    )


def price_of(seconds: float, per_hour: float | None) -> float | None:
    """Return what ``seconds`` cost; None where no price is known."""
    return None if per_hour is None else seconds / 3600 * per_hour


def _tell_over(budget: Budget, seconds: float, emit: EventSink) -> None:
    if seconds > budget.seconds:
        over, planned = whole_duration(seconds - budget.seconds), whole_duration(budget.expected_seconds)
        emit(
            Warned(
                text=f"the training took {over} longer than {whole_duration(budget.seconds)}: {planned} were expected of "
                f"steps of {duration(budget.step_seconds)}, as measured at the start"
            )
        )


def _waited_saves(settings: Settings, steps: int, seconds: float) -> float:
    """Return how many saves a training waits for: the last checkpoint, the final model, and those not in the background."""
    final = 4 / 3  # a checkpoint holds the weights and, as a rule, twice as much of the optimizer's
    if settings.checkpoint.in_background:
        return final
    every, minutes = settings.checkpoint.every_steps, settings.checkpoint.every_minutes
    return final + max((steps - 1) // every if every else 0, seconds / (60 * minutes) if minutes else 0)
