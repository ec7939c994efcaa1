"""Send the numbers of a run to TensorBoard, Weights & Biases or MLflow. None of them can stop a run.

What is sent: losses, learning rate, gradient norm, speed and memory by step, and the settings, which hold no secrets. Not
sent: rows, answers, paths of this machine beside those in the settings, its name, its command line, or its code.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import assert_never

from sftcli.config.schema.run import Tracker
from sftcli.config.schema.settings import Settings
from sftcli.errors import SftError, first_line
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    EarlierDone,
    Event,
    EventSink,
    ExpertLoad,
    FitEnded,
    FitStarted,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    ModelSaved,
    Notice,
    Progressed,
    RunStarted,
    StepDone,
    TextDelta,
    Warned,
    fan_out,
)
from sftcli.extras import install_command
from sftcli.services.runs.folder import RunFolder
from sftcli.services.trackers.base import Numbers
from sftcli.services.trackers.mlflow import MlflowNumbers
from sftcli.services.trackers.tensorboard import TensorBoardNumbers
from sftcli.services.trackers.wandb import WandbNumbers

KINDS: Mapping[Tracker, Callable[..., Numbers]] = {
    Tracker.TENSORBOARD: TensorBoardNumbers,
    Tracker.WANDB: WandbNumbers,
    Tracker.MLFLOW: MlflowNumbers,
}


class TrackerSink:
    """Sends metrics of events to a tracker. The first failure is a warning, and the tracker is dropped.

    Args:
        name: Of the tracker.
        start: Makes it; called at once.
        warn: Told of the failure.
    """

    def __init__(self, name: str, start: Callable[[], Numbers], warn: EventSink) -> None:
        self.name = name
        self.warn = warn
        self._numbers: Numbers | None = None
        self._try(lambda: self._start(start))

    def __call__(self, event: Event, /) -> None:
        """Hand on what a step or a held-out measurement holds."""
        found = numbers_of(event)
        if found is not None:
            step, numbers = found
            self._try(lambda: self._numbers.log(step, numbers) if self._numbers else None)

    def close(self) -> None:
        """End the tracker's run."""
        self._try(lambda: self._numbers.close() if self._numbers else None)

    def _start(self, start: Callable[[], Numbers]) -> None:
        self._numbers = start()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever happens in a tracker, the run goes on
            self._numbers = None
            self.warn(
                Warned(
                    text=f"metrics are no longer sent to {self.name}: {_reason(error)}; the run continues without it"
                )
            )


def numbers_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """Return the step and the numbers of an event that has some."""
    match event:
        case StepDone():
            used = {} if event.utilization is None else {"speed/utilization": event.utilization}
            memory = {"memory/peak_gb": event.peak_memory_bytes / 1e9} if event.peak_memory_bytes else {}
            beside = {"train/objective": event.objective, "train/router_aux_loss": event.router_aux_loss}
            known = {name: value for name, value in beside.items() if value is not None}
            return event.step, used | memory | known | {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/epoch": event.epoch,
                "speed/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            }
        case HeldoutDone():
            load, given = ExpertLoad.worst(event.experts), event.given
            score = {f"heldout/{given.measure.replace(' ', '_')}": given.score} if given else {}
            return event.step, {"heldout/loss": event.loss} | score | {
                f"experts/{name}": value for name, value in (asdict(load) if load else {}).items()
            }
        case EarlierDone():
            right = {f"earlier/{event.run}/right": event.right / event.answered} if event.answered else {}
            return event.step, {f"earlier/{event.run}/loss": event.loss} | right
        case Notice() | Warned() | Judged() | RunStarted() | Progressed() | DataPrepared() | ModelLoaded():
            return None
        case FitStarted() | MemoryEased() | CheckpointSaved() | FitEnded() | ModelSaved() | TextDelta():
            return None
        case _:
            assert_never(event)


@contextmanager
def tracked(run: RunFolder, settings: Settings, emit: EventSink, *, after_step: int) -> Iterator[EventSink]:
    """Yield a sink that forwards events to ``emit`` and every tracker of ``run.trackers``.

    Args:
        run: Whose numbers.
        settings: Of the run.
        emit: Told everything first, and what is wrong with a tracker.
        after_step: The step that a resumed run goes on from; -1 for a new one.
    """
    sinks = [
        TrackerSink(kind, lambda kind=kind: KINDS[kind](run, settings, after_step=after_step), emit)  # type: ignore[misc]
        for kind in settings.run.trackers
    ]
    try:
        yield fan_out(emit, *sinks)
    finally:
        for sink in sinks:
            sink.close()


def _packages(module: str) -> tuple[str, ...]:
    top = module.partition(".")[0]
    return (f"{top}-skinny",) if top == "mlflow" else (top,)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed ({install_command('track', *_packages(error.name or ''))})"
    if isinstance(error, SftError):
        return f"{error.message} ({error.hint})"
    return first_line(error)
