"""Send the numbers of a run to TensorBoard, Weights & Biases or MLflow. None of them can stop a run.

What is sent: losses, learning rate, gradient norm, speed and memory by step, and the settings, which hold no secrets. Not
sent: rows, answers, paths of this machine beside those in the settings, its name, its command line, or its code.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from sftcli import storage
from sftcli.config.schema.run import Tracker
from sftcli.config.schema.settings import Settings
from sftcli.errors import SftError, UsageError
from sftcli.events import Event, EventSink, HeldoutDone, StepDone, Warned, fan_out
from sftcli.extras import install_command
from sftcli.services.runs.folder import RunFolder, write_text

PROJECT = "sft"
_WANDB_SECONDS = 20.0  # the longest that a start may wait for the service


class Numbers(Protocol):
    """Where numbers go."""

    def log(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """Be done."""
        ...


class TensorBoardNumbers:
    """Event files in ``RUN/trackers/tensorboard``; on resume, later steps of the old ones are no longer shown."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.trackers / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=after_step + 1 if after_step >= 0 else None)
        rows = "\n".join(f"| {key} | {value} |" for key, value in _flat(settings).items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()


class WandbNumbers:
    """A run of Weights & Biases; its files are in ``RUN/trackers``. ``WANDB_MODE=offline`` keeps them there."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise UsageError("no login is known", hint="wandb login, or WANDB_MODE=offline")
        storage.make_folders(run.trackers)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=_kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow" if after_step >= 0 else None,
            dir=str(run.trackers),
            config=_flat(settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # the command line and the name of this machine
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=_WANDB_SECONDS,
            ),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


class MlflowNumbers:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:  # noqa: ARG002
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        known = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = _kept_id(
            run, "mlflow", lambda: self._client.create_run(known, run_name=run.name).info.run_id
        )
        params = [Param(key, str(value)[:500]) for key, value in _flat(settings).items()]
        self._client.log_batch(self._id, params=params[:100])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


KINDS: Mapping[Tracker, Callable[..., Numbers]] = {
    Tracker.TENSORBOARD: TensorBoardNumbers,
    Tracker.WANDB: WandbNumbers,
    Tracker.MLFLOW: MlflowNumbers,
}


class TrackerSink:
    """Hands numbers of events on. The first failure is a warning, and the end of it.

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
                Warned(text=f"{self.name} gets no more numbers: {_told(error)}; the run goes on without it")
            )


def numbers_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """Return the step and the numbers of an event that has some."""
    match event:
        case StepDone():
            used = {} if event.utilisation is None else {"speed/utilisation": event.utilisation}
            memory = {"memory/peak_gb": event.peak_memory_bytes / 1e9} if event.peak_memory_bytes else {}
            return event.step, used | memory | {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/epoch": event.epoch,
                "speed/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            }
        case HeldoutDone():
            return event.step, {"heldout/loss": event.loss}
        case _:
            return None


@contextmanager
def tracked(run: RunFolder, settings: Settings, emit: EventSink, *, after_step: int) -> Iterator[EventSink]:
    """Yield a sink that tells ``emit`` and every tracker of ``run.trackers``.

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


def _kept_id(run: RunFolder, kind: str, make: Callable[[], str]) -> str:
    """Return the tracker's name of this run: the same one when the run is resumed."""
    path = run.trackers / f"{kind}.id"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = make()
    storage.make_folders(run.trackers)
    write_text(path, f"{made}\n")
    return made


def _flat(settings: Settings) -> dict[str, object]:
    return {
        f"{section}.{key}": value
        for section, values in settings.model_dump(mode="json", exclude_none=True).items()
        for key, value in values.items()
    }


def _packages(module: str) -> tuple[str, ...]:
    top = module.partition(".")[0]
    return (f"{top}-skinny",) if top == "mlflow" else (top,)


def _told(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed ({install_command('track', *_packages(error.name or ''))})"
    if isinstance(error, SftError):
        return f"{error.message} ({error.hint})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
