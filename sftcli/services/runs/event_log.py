"""The two logs of a run: every event for programs, and the same story for people."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True)
class Lines:
    """The whole lines of a file, each a JSON object, with its text and end; and how many others there were."""

    found: tuple[tuple[str, Mapping[str, object]], ...]
    damaged: int

    def told(self, path: Path) -> str:
        """Return in words what was left out; empty where all lines are whole."""
        if not self.damaged:
            return ""
        what = "a line that is" if self.damaged == 1 else f"{self.damaged} lines that are"
        return f"{path}: {what} not whole, as after a kill or on a full disk, left out"


def read_lines(path: Path) -> Lines:
    """Read a file of JSON objects; a line that is torn, or not one, is counted and left out."""
    pieces = path.read_bytes().split(b"\n")
    lines = [*map(_parsed, pieces[:-1])]
    whole = tuple(line for line in lines if line is not None)
    return Lines(found=whole, damaged=len(lines) - len(whole) + bool(pieces[-1]))


def _parsed(line: bytes) -> tuple[str, Mapping[str, object]] | None:
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return (text + "\n", value) if isinstance(value, dict) else None


def end_torn_line(path: Path) -> str:
    """Cut off a last line that a crash left without its end; return in words that it was."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        storage.disk.truncate(path, content.rfind(b"\n") + 1)
        return Lines(found=(), damaged=1).told(path)
    return ""


def lines_up_to(lines: Lines, step: int, *, owes_heldout: bool = False) -> Iterator[str]:
    """Yield the lines of an event log without the events of steps after ``step``, none for -1.

    With ``owes_heldout`` the held-out loss of ``step`` will be measured again: a start that measured it and ended before that
    was saved has left one, which goes, and what was said because of it.
    """
    is_measured_again = False
    for text, event in lines.found if step >= 0 else ():
        at, kind = event.get("step"), event.get("event")
        is_later = isinstance(at, int) and at > step
        if owes_heldout and at == step and kind == "HeldoutDone":
            is_measured_again = True
        elif not (is_later or kind in {None, "FitEnded"} or (is_measured_again and kind == "Judged")):
            yield text
