"""The two logs of a run: every event for programs, and the same story for people."""

import json
from types import TracebackType
from typing import BinaryIO, Self

from sftcli import storage
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    Ending,
    Event,
    FitEnded,
    FitStarted,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    ModelSaved,
    Notice,
    Progressed,
    StepDone,
    TextDelta,
    Warned,
    event_record,
)
from sftcli.services.runs.folder import RunFolder, write_text
from sftcli.services.runs.log_repair import end_torn_line, lines_up_to, read_lines


class RunLog:
    """The sink that keeps ``events.jsonl`` and ``training.log``. Unlike a view it may fail the run.

    Args:
        run: Whose logs.
        every_steps: How often a step is written to ``training.log``; ``events.jsonl`` has every step.
        after_step: On resume, the step that training goes on from: later steps in the log are cut off, so that the log
            holds each step once. -1 starts an empty log.
        owes_heldout: Whether the held-out loss of that step is still to be measured.
    """

    def __init__(
        self, run: RunFolder, *, every_steps: int, after_step: int | None = None, owes_heldout: bool = False
    ) -> None:
        self.every_steps = every_steps
        self.last_step = 0
        self.repaired: list[str] = []  # what was left out of logs that a crash has torn, in words
        events = run.path / "events.jsonl"
        if after_step is not None and events.exists():
            lines = read_lines(events)
            write_text(events, "".join(lines_up_to(lines, after_step, owes_heldout=owes_heldout)))
            self.repaired = [lines.told(events)]
        self.repaired = [*filter(None, [*self.repaired, end_torn_line(run.path / "training.log")])]
        self._events: BinaryIO = storage.disk.append(events)
        self._text: BinaryIO = storage.disk.append(run.path / "training.log")

    def __call__(self, event: Event, /) -> None:
        """Write ``event`` to both files."""
        if isinstance(event, Progressed | TextDelta):
            return
        storage.append_line(
            self._events, json.dumps(event_record(event), ensure_ascii=False, allow_nan=False)
        )
        if isinstance(event, FitStarted):
            self.last_step = event.last_step
        line = self._line(event)
        if line:
            storage.append_line(self._text, line)

    def _line(self, event: Event) -> str:  # noqa: C901 - one flat case per event
        match event:
            case StepDone():
                if event.step % self.every_steps and event.step != self.last_step:
                    return ""
                return _step_line(event)
            case HeldoutDone():
                return f"step={event.step} heldout_loss={event.loss:.4f} rows={event.rows}"
            case ModelLoaded():
                why = f" ({event.precision_why})" if event.precision_why else ""
                return f"Model: {event.parameters / 1e6:.1f}M parameters, on {event.device} in {event.precision}{why}"
            case DataPrepared():
                return (
                    f"Loading instruction dataset: {event.source}\nTraining examples: {event.train_examples}"
                )
            case FitStarted():
                onward = f", going on from step {event.step}" if event.step else ""
                return f"Starting SFT for {event.last_step} steps{onward}"
            case CheckpointSaved():
                return f"Saved checkpoint: {event.path}"
            case FitEnded(ending=Ending.PLATEAU):
                return f"Stopped early at step {event.step}: held-out loss fell no more"
            case FitEnded(ending=Ending.STOPPED):
                return f"Stopped at step {event.step}"
            case ModelSaved():
                return f"SFT complete. Final checkpoint: {event.pt or event.path}"
            case Notice() | MemoryEased():
                return event.text
            case Judged():
                return f"{event.kind} at step {event.step}: {event.reason}. Advice: {event.advice}"
            case Warned():
                return f"warning: {event.text}"
            case _:
                return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        self._text.close()


def _step_line(event: StepDone) -> str:
    """Return a step as ``step=10 loss=1.2345 lr=9.511e-06 response_tokens/s=512 padding=9% memory=2.10GB of_peak=31%``."""
    speed = event.response_tokens / max(event.seconds, 1e-9)
    padding = event.padding_tokens / max(1, event.padding_tokens + event.tokens)
    used = "" if event.utilisation is None else f" of_peak={event.utilisation:.0%}"
    text = " text" if event.text_tokens else ""
    memory = f" memory={event.peak_memory_bytes / 1e9:.2f}GB" if event.peak_memory_bytes else ""
    return (
        f"step={event.step} loss={event.loss:.4f} lr={event.learning_rate:.3e} response_tokens/s={speed:.0f} "
        f"padding={padding:.0%}{memory}{used}{text}"
    )
