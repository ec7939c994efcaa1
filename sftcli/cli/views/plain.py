"""Events as lines of plain text, and the views that need no terminal."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from sftcli.cli.terminal.text import (
    clean,
    count,
    duration,
    flop_rate,
    loss_text,
    norm_text,
    percent,
    rate_text,
    redact,
    short_count,
    size,
    whole_duration,
    writable,
)
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    Ending,
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
)

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.events import Event

LINE_SECONDS = 60.0  # a log that says nothing for longer looks dead
TASK_QUIET_SECONDS = 10.0  # work that is over by then needs no line

STOP_TEXT = "stopping after this step; press Ctrl-C again to quit now"


def run_line(event: RunStarted) -> str:
    """Return ``run quick-1 in runs/quick-1``."""
    return f"run {clean(event.run)} in {clean(event.path)}"


def data_line(event: DataPrepared) -> str:
    """Return what became of the rows, in one line."""
    parts = [f"{count(event.kept)} of {count(event.rows)} rows kept"]
    if event.rejected:
        reasons = ", ".join(
            f"{count(rows)} {clean(reason)}" for reason, rows in sorted(event.rejected.items())
        )
        parts[0] += f" (rejected: {reasons})"
    parts.append(f"{count(event.train_examples)} train, {count(event.heldout_examples)} held-out")
    share = event.response_tokens / event.train_tokens if event.train_tokens else 0.0
    parts.append(f"{short_count(event.train_tokens)} tokens, {percent(share)} of them trained")
    cached = " (from cache)" if event.cached else ""
    return f"data {clean(event.source)} [{clean(event.schema)}]{cached}: " + "; ".join(parts)


def model_line(event: ModelLoaded) -> str:
    """Return which model is where, in one line."""
    # A model that only answers trains nothing, which goes without saying.
    is_all_or_nothing = event.trainable in {0, event.parameters}
    trainable = "" if is_all_or_nothing else f", {short_count(event.trainable)} trained"
    size = f"{short_count(event.parameters)} parameters{trainable}"
    peak = f", {flop_rate(event.peak_flops)} measured" if event.peak_flops else ""
    why = f" ({clean(event.precision_why)})" if event.precision_why else ""
    return (
        f"model {clean(event.name)}: {size}, on {clean(event.device)} in {clean(event.precision)}{why}{peak}"
    )


def heldout_line(event: HeldoutDone) -> str:
    """Return one evaluation."""
    return (
        f"step {event.step}  held-out loss {loss_text(event.loss, event.rows)}  ({duration(event.seconds)})"
    )


def judged_text(event: Judged) -> str:
    """Return the reason of a judgement and its advice, in one line."""
    return f"{clean(event.reason)}. Advice: {clean(event.advice)}"


def end_line(event: FitEnded, seconds: float, measures: TrainingMeasures) -> str:
    """Return how training ended, and what part of the measured peak of matrix products it made use of."""
    used = measures.whole_utilisation
    at = "" if used is None else f" at {percent(used)} of the machine's peak"
    verb = "finished" if event.ending is Ending.FINISHED else "stopped"
    early = " early" if event.ending is Ending.PLATEAU else ""
    why = ": held-out loss fell no more" if early else ""
    return f"training {verb}{early} at step {event.step} after {duration(seconds)}{at}{why}"


def step_line(measures: TrainingMeasures, step: StepDone) -> str:
    """Return one training step as ``step 20/90  loss 1.234  lr 2.0e-04  grad 1.9  512 tok/s  pad 9%  2.1 GB  eta 1m20s``.

    The speed is in response tokens, the memory is the peak so far.
    """
    remaining = measures.remaining_seconds
    parts = [
        f"step {step.step}/{measures.last_step}",
        f"loss {loss_text(step.loss)}",
        f"lr {rate_text(step.learning_rate)}",
        f"grad {norm_text(step.grad_norm)}",
        f"{count(measures.response_tokens_per_second)} tok/s",
        f"pad {percent(measures.padding_fraction)}",
        *([] if measures.utilisation is None else [f"{percent(measures.utilisation)} of peak"]),
        *([size(step.peak_memory_bytes)] if step.peak_memory_bytes else []),
        f"eta {whole_duration(remaining) if remaining is not None else '?'}",
    ]
    return "  ".join(parts) + ("  text" if step.text_tokens else "") + ("" if step.applied else "  skipped")


def progress_line(event: Progressed, seconds: float) -> str:
    """Return ``preparing rows.jsonl 1,200/5,000 rows, 240/s, 16s left``, of work that has taken ``seconds``."""
    amount = size if event.unit == "bytes" else count
    unit = "" if event.unit == "bytes" else f" {clean(event.unit)}"
    total = f"/{amount(event.total)}" if event.total else ""
    parts = [f"{clean(event.task)} {amount(event.done)}{total}{unit}"]
    if event.done and seconds > 0:
        parts.append(f"{amount(event.done / seconds)}/s")
        if event.done < event.total:
            parts.append(f"{whole_duration(seconds * (event.total - event.done) / event.done)} left")
    return ", ".join(parts)


def write_line(stream: "TextIO", text: str) -> None:
    """Write one line and flush it. A stream that is closed or broken is let go: progress never ends the work."""
    try:
        stream.write(writable(redact(text), stream.encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):
        pass


@dataclass(slots=True)
class _Task:
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
    """

    stream: "TextIO"
    get_time: Callable[[], float]
    every_steps: int
    measures: TrainingMeasures = field(default_factory=TrainingMeasures)
    _line_time: float = 0.0
    _fit_time: float = 0.0
    _tasks: dict[str, _Task] = field(default_factory=dict)  # running ones

    def open(self) -> None:
        """Do nothing: there is nothing to prepare."""

    def close(self) -> None:
        """Do nothing: every line is out already."""

    def show_stopping(self) -> None:
        """Say that a stop was asked for."""
        self._write(STOP_TEXT)

    def __call__(self, event: "Event", /) -> None:  # noqa: C901 - one flat case per event
        """Write the lines of an event."""
        match event:
            case Notice() | MemoryEased():
                self._write(clean(event.text))
            case Warned():
                self._write(f"warning: {clean(event.text)}")
            case Judged():
                self._write(f"{event.kind}: {judged_text(event)}")
            case RunStarted():
                self._write(run_line(event))
            case Progressed():
                self._progress(event)
            case DataPrepared():
                self._write(data_line(event))
            case ModelLoaded():
                self._write(model_line(event))
            case FitStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case HeldoutDone():
                self.measures.add_heldout(event)
                self._write(heldout_line(event))
            case CheckpointSaved():
                self.measures.add_checkpoint(event)
                self._write(f"saved {clean(event.path)}  ({duration(event.seconds)})")
            case FitEnded():
                self._write(end_line(event, self.get_time() - self._fit_time, self.measures))
            case ModelSaved():
                self._write(f"saved {clean(event.path)}")
            case TextDelta():
                pass  # a result; it belongs to stdout
            case _:
                assert_never(event)

    def _write(self, text: str) -> None:
        write_line(self.stream, text)

    def _start(self, event: FitStarted) -> None:
        self.measures.start(event)
        self._fit_time = self._line_time = self.get_time()
        begin = "training" if event.step == 0 else f"training goes on after step {event.step}"
        self._write(f"{begin}, {count(event.last_step)} step{'s' if event.last_step != 1 else ''}")

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
        task = self._tasks.setdefault(event.task, _Task(start=now, due=now + TASK_QUIET_SECONDS))
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
        write_line(self.stream, STOP_TEXT)

    def __call__(self, event: "Event", /) -> None:
        """Write warnings, drop the rest."""
        if isinstance(event, Warned):
            write_line(self.stream, f"warning: {clean(event.text)}")
        elif isinstance(event, Judged):
            write_line(self.stream, f"{event.kind}: {judged_text(event)}")


@dataclass(slots=True)
class TextWriter:
    """Writes generated text to a stream as it comes: made harmless on a terminal, untouched into a file or pipe.

    Raises:
        BrokenPipeError: The reader is gone. This is a result, so it must not be lost in silence.
    """

    stream: "TextIO"
    raw: bool

    def __call__(self, event: "Event", /) -> None:
        """Write the text of a ``TextDelta``, drop the rest."""
        if isinstance(event, TextDelta):
            text = event.text if self.raw else clean(event.text, keep="\n\t")
            self.stream.write(writable(text, self.stream.encoding))
            self.stream.flush()


def stdout_text_writer(*, raw: bool = False) -> TextWriter:
    """Return a writer of generated text to stdout; ``raw`` leaves control characters alone on a terminal too."""
    return TextWriter(stream=sys.stdout, raw=raw or not sys.stdout.isatty())
