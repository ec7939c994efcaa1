"""The live view: a small panel at the bottom of the terminal, with lasting lines above it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event as ThreadEvent
from threading import RLock, Thread
from typing import TYPE_CHECKING

from rich.text import Text

from sftcli.cli.terminal.text import signs, writable
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.panel import NOTE, Frame, Row, Task, build_panel
from sftcli.cli.views.plain import HANG
from sftcli.cli.views.region import Region
from sftcli.cli.views.wording import end_line, message, stop_text
from sftcli.errors import redact
from sftcli.events import (
    CheckpointSaved,
    FitEnded,
    FitStarted,
    HeldoutDone,
    Progressed,
    RunStarted,
    StepDone,
    TextDelta,
)
from sftcli.figures import whole_duration

if TYPE_CHECKING:
    from rich.console import Console

    from sftcli.events import Event

REFRESH_SECONDS = 0.25
SILENT_SECONDS = 2.0  # after which something moves, whatever is done


@dataclass(slots=True)
class LiveView:
    """Shows events on a terminal as they come.

    A thread redraws the panel, so that times move during a long step; it draws only what changed. Events may come from
    one other thread. A terminal that is gone ends the view and not the work.

    Args:
        console: A console on stderr.
        get_time: A monotonic clock in seconds.
        auto_refresh: Whether to start the thread; without it, ``refresh`` draws.
        redirect_stdout: Whether text that libraries print goes above the panel; right only where stdout is the same
            terminal.
    """

    console: "Console"
    get_time: Callable[[], float]
    auto_refresh: bool = True
    redirect_stdout: bool = False
    measures: TrainingMeasures = field(default_factory=TrainingMeasures)
    _tasks: dict[str, tuple[Progressed, float]] = field(default_factory=dict)  # event, time of the first
    _fit_time: float | None = None
    _said_time: float | None = None  # of the last line, while nothing else on the screen moves
    _fit_end_time: float | None = None
    _moved_time: float = 0.0
    _checkpoint_time: float = 0.0
    _note: str = ""
    _in_line: bool = False  # generated text stands in front of the cursor: drawing would wipe it
    _dead: bool = False
    _drawn: object = None
    _region: Region | None = None
    _lock: RLock = field(default_factory=RLock)
    _done: ThreadEvent = field(default_factory=ThreadEvent)

    def open(self) -> None:
        """Start to redraw. A command that says nothing at first is silent from here on."""
        self._said_time = self.get_time()
        if self.auto_refresh:
            Thread(target=self._redraw, name="live-view", daemon=True).start()

    def close(self) -> None:
        """Stop to redraw. The panel of a training run stays on the screen as its record; bars go away."""
        self._done.set()
        with self._lock:
            self._tasks.clear()
            self._note, self._said_time = "", None
            if self._fit_time is not None and self._fit_end_time is None:
                self._fit_end_time = self.get_time()
            self._hide()

    def show_stopping(self) -> None:
        """Say that a stop was asked for; called from the thread that watches signals."""
        with self._lock:
            if self._in_line:
                return  # it would stand within an answer, which is cut with a word at its next token
            self._note = stop_text(trains=bool(self.measures.last_step))
            if self._region is None:
                self._print("", self._note)
            else:
                self.refresh()

    def refresh(self) -> None:
        """Draw the panel if it differs from what is on the screen."""
        with self._lock:
            rows = self._rows()
            key = (rows, self.console.size)
            if self._dead or self._in_line or key == self._drawn or not (rows or self._region):
                return
            self._drawn = key
            self._guard(lambda: self._draw(rows))

    def __call__(self, event: "Event", /) -> None:
        """Take an event in, and draw at once what lasts."""
        with self._lock:
            self._take(event)

    def _take(self, event: "Event") -> None:
        match event:
            case RunStarted():
                self._begin()
                self._print(*message(event))
            case Progressed():
                self._progress(event)
            case FitStarted():
                self.measures.start(event)
                self._fit_time = self._moved_time = self.get_time()
                self.refresh()
            case StepDone():
                self.measures.add_step(event)
                self._moved_time = self.get_time()
            case HeldoutDone():
                self.measures.add_heldout(event)
                self._moved_time = self.get_time()  # what it took is no longer part of the time that is left
            case CheckpointSaved():
                self.measures.add_checkpoint(event)
                self._checkpoint_time = self.get_time()
            case FitEnded():
                self._fit_end_time = self.get_time()
                self._note = ""
                self._print("", end_line(event, self.measures))
            case TextDelta():
                self._said_time = None
                self._hide()
                self._in_line = not event.text.endswith("\n")
            case _:
                self._print(*message(event))

    def _begin(self) -> None:
        """Leave the panel of the training before on the screen: of several, each has one of its own."""
        self._said_time = None
        self._hide()
        self.measures, self._fit_time, self._fit_end_time = TrainingMeasures(), None, None

    def _progress(self, event: Progressed) -> None:
        if event.total > 0 and event.done >= event.total:
            self._tasks.pop(event.task, None)
            if not self._tasks and self._fit_time is None:
                self._hide()
            return
        is_new = event.task not in self._tasks
        since = self.get_time() if is_new else self._tasks[event.task][1]
        self._tasks[event.task] = (event, since)
        if is_new:
            self.refresh()

    def _rows(self) -> list[Row]:
        now = self.get_time()
        silent = 0.0 if self._said_time is None else now - self._said_time
        silence: list[Row] = []
        trains = self._fit_time is not None and self._fit_end_time is None
        if silent >= SILENT_SECONDS and not self._tasks and not trains:
            silence = [[(f"still at it, {whole_duration(silent)}", "dim")]]
        if silence and self._fit_time is None:
            note: list[Row] = [[(self._note, NOTE)]] if self._note else []
            return [*silence, *note]
        frame = Frame(
            is_training=self._fit_time is not None,
            elapsed_seconds=self._elapsed(),
            since_step_seconds=now - self._moved_time,
            checkpoint_age_seconds=(self._fit_end_time or now) - self._checkpoint_time,
            final=self._fit_end_time is not None,
            note=self._note,
            tasks=tuple(Task(event=event, seconds=now - since) for event, since in self._tasks.values()),
        )
        # One column stays free: a line that fills the last one wraps in some terminals, and so does the panel on resize.
        columns = max(1, self.console.width - 1)
        rows = build_panel(self.measures, frame, columns=columns, signs=signs(self.console.encoding))
        rows += silence  # behind the training: the final model, the page
        return rows[: max(1, self.console.height - 1)]

    def _elapsed(self) -> float:
        if self._fit_time is None:
            return 0.0
        return (self.get_time() if self._fit_end_time is None else self._fit_end_time) - self._fit_time

    def _draw(self, rows: list[Row]) -> None:
        if self._region is None:
            self._region = Region(self.console, redirect_stdout=self.redirect_stdout)
            self._region.start()
        self._region.update(
            [Text.assemble(*((self._safe(text), style) for text, style in row)) for row in rows]
        )

    def _hide(self) -> None:
        """Take the panel off the screen, or leave it there for good where it records a run."""
        region = self._region
        if region is None:
            return
        keep = self._fit_end_time is not None
        if keep:
            self.refresh()
        self._region, self._drawn = None, None
        self._guard(lambda: region.stop(keep=keep))

    def _print(self, prefix: str, text: str) -> None:
        if self._dead:
            return
        self._said_time = self.get_time()
        if not self._tasks and self._fit_time is None:
            self._hide()  # what counted the silence
        line = Text.assemble((prefix, "bold yellow"), self._safe(text))
        # Later rows of a long line are set in, so that its beginning can be found. Paths longer than a row break anywhere.
        room = max(1, self.console.width - len(HANG))
        rows = (
            line.wrap(self.console, room, overflow="fold") if line.cell_len > self.console.width else [line]
        )
        hung = Text("\n" + HANG).join(rows)
        self._guard(lambda: self.console.print(hung, soft_wrap=True))

    def _safe(self, text: str) -> str:
        return writable(redact(text), self.console.encoding)

    def _guard(self, draw: Callable[[], None]) -> None:
        """Draw; let go of a terminal that was closed."""
        try:
            draw()
        except (OSError, ValueError):
            self._dead = True
            self._done.set()

    def _redraw(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            self.refresh()
