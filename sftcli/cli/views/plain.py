"""Events as lines of plain text, and the views that need no terminal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from sftcli.cli.terminal.text import clean, writable
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.wording import (
    end_line,
    heldout_line,
    message,
    progress_line,
    says_text,
    step_line,
    stop_text,
)
from sftcli.errors import redact
from sftcli.events import (
    CheckpointSaved,
    FitEnded,
    FitStarted,
    HeldoutDone,
    Judged,
    Progressed,
    RunStarted,
    StepDone,
    TextDelta,
    Warned,
)
from sftcli.figures import counted, duration

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.events import Event

LINE_SECONDS = 60.0  # a log that says nothing for longer looks dead
HANG = "  "  # before the later rows of a line
TASK_QUIET_SECONDS = 10.0  # work that is over by then needs no line


def write_line(stream: "TextIO", text: str) -> None:
    """Write one line and flush it."""
    write_text(stream, f"{text}\n")


def _rows(text: str, columns: int) -> str:
    """Return ``text`` in rows of whole words; those after the first are set in. A path that is longer stays whole."""
    if not 0 < columns < len(text):
        return text
    words = TextWrapper(width=columns, subsequent_indent=HANG, break_long_words=False, break_on_hyphens=False)
    return "\n".join(words.wrap(text))


def write_text(stream: "TextIO", text: str) -> None:
    """Write and flush ``text``. A stream that is closed or broken is let go: progress never ends the work."""
    try:
        stream.write(writable(redact(text), stream.encoding))
        stream.flush()
    except (OSError, ValueError):
        pass


@dataclass(slots=True)
class Task:
    """A task that is going on."""

    start: float
    due: float  # when it may say something next
    is_loud: bool = False  # whether it has said something


@dataclass(slots=True)
class PlainView:
    """One line per event worth a line, for logs: no carriage returns, no escapes, nothing that moves.

    Args:
        stream: Where the lines go.
        get_time: A monotonic clock in seconds.
        every_steps: Steps between two lines; slow steps get a line a minute all the same.
        columns: The width of a terminal, where long lines go on in further rows; 0 for a log, whose lines stay whole.
    """

    stream: "TextIO"
    get_time: Callable[[], float]
    every_steps: int
    columns: int = 0
    measures: TrainingMeasures = field(default_factory=TrainingMeasures)
    _line_time: float = 0.0
    _tasks: dict[str, Task] = field(default_factory=dict)  # running ones

    def open(self) -> None:
        """Do nothing: there is nothing to prepare."""

    def close(self) -> None:
        """Do nothing: every line is out already."""

    def show_stopping(self) -> None:
        """Say that a stop was asked for."""
        self._write(stop_text(trains=bool(self.measures.last_step)))

    def __call__(self, event: "Event", /) -> None:
        """Write the lines of an event."""
        match event:
            case RunStarted():
                self.measures = (
                    TrainingMeasures()
                )  # of several runs one after the other each counts by itself
                self._write("".join(message(event)))
            case Progressed():
                self._progress(event)
            case FitStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case HeldoutDone():
                self.measures.add_heldout(event)
                self._write(heldout_line(event))
                if event.given and (says := says_text(event.given)):
                    self._write(HANG + says)
            case CheckpointSaved():
                self.measures.add_checkpoint(event)
                self._write(f"saved {clean(event.path)}  ({duration(event.seconds)})")
            case FitEnded():
                self._write(end_line(event, self.measures))
            case TextDelta():
                pass  # a result; it belongs to stdout
            case _:
                self._write("".join(message(event)))

    def _write(self, text: str) -> None:
        write_line(self.stream, _rows(text, self.columns))

    def _start(self, event: FitStarted) -> None:
        self.measures.start(event)
        self._line_time = self.get_time()
        begin = "training" if event.step == 0 else f"training resumes after step {event.step}"
        self._write(f"{begin}, {counted(event.last_step, 'step')}")

    def _step(self, event: StepDone) -> None:
        is_first = self.measures.last is None
        self.measures.add_step(event)
        now = self.get_time()
        on_turn = is_first or event.step % self.every_steps == 0 or event.step == self.measures.last_step
        if on_turn or not event.applied or now - self._line_time >= LINE_SECONDS:
            self._line_time = now
            self._write(step_line(self.measures, event))

    def _progress(self, event: Progressed) -> None:
        now = self.get_time()
        task = self._tasks.setdefault(event.task, Task(start=now, due=now + TASK_QUIET_SECONDS))
        is_over = event.total > 0 and event.done >= event.total
        if now >= task.due or (is_over and task.is_loud):
            task.is_loud, task.due = True, now + LINE_SECONDS / 2
            self._write(progress_line(event, now - task.start))
        if is_over:
            self._tasks.pop(event.task)


@dataclass(slots=True)
class SilentView:
    """Warnings only, on stderr: for ``--quiet`` and ``--json``."""

    stream: "TextIO"

    def open(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def show_stopping(self) -> None:
        """Say that a stop was asked for: a person pressed a key and waits for an answer."""
        write_line(self.stream, stop_text(trains=False))

    def __call__(self, event: "Event", /) -> None:
        """Write warnings, drop the rest."""
        if isinstance(event, Warned | Judged):
            write_line(self.stream, "".join(message(event)))
