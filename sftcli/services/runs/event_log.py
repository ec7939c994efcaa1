"""The two logs of a run: every event for programs, which is read back as events, and the same story for people."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, BinaryIO, Self, assert_never, get_args, get_type_hints

from sftcli import storage
from sftcli.config.schema.run import RunSettings
from sftcli.errors import Location, ResourceError, SftError, StorageError, UsageError
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    EarlierDone,
    Ending,
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
    event_record,
)
from sftcli.own_files import FormError, as_form
from sftcli.services.runs.folder import RunFolder

_KINDS: Mapping[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}
_TEXT = "training.log"
_FORMER_NAMES = {
    "micro_batch_tokens": "pass_tokens",
    "micro_batches": "passes",
    "utilization": "utilisation",
}  # in logs of older versions


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
        self.run = run
        self.every_steps = every_steps
        self.last_step = 0
        self.repaired: list[str] = []  # what was left out of logs that a crash has torn, in words
        events = run.events
        if after_step is not None and events.exists():
            lines = read_lines(events)
            kept = lines_up_to(lines, after_step, owes_heldout=owes_heldout)
            storage.replace_file(events, "".join(kept).encode())
            self.repaired = [lines.message(events)]
        self.repaired = [*filter(None, [*self.repaired, end_torn_line(run.path / _TEXT)])]
        self._events: BinaryIO = storage.disk.append(events)
        self._text: BinaryIO = storage.disk.append(run.path / _TEXT)

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
            # Of the others, programs of the pipeline look for some word for word.
            time = f" at={datetime.now(tz=UTC):%H:%M:%SZ}" if isinstance(event, StepDone) else ""
            storage.append_line(self._text, line + time)

    def sync(self) -> None:
        """Make what was logged survive a loss of power: a run goes on behind the steps of a checkpoint, so these come first.

        Raises:
            OSError: The disk fails.
        """
        for path in (self.run.events, self.run.path / _TEXT, self.run.path):
            storage.disk.sync(path)

    def _line(self, event: Event) -> str:  # noqa: C901 - one flat case per event
        match event:
            case StepDone():
                if event.step % self.every_steps and event.step != self.last_step:
                    return ""
                return _step_line(event)
            case HeldoutDone():
                return _heldout_line(event)
            case EarlierDone():
                at = f"step={event.step} rows_of={event.run} heldout_loss={event.loss:.4f}"
                return f"{at} right={event.right} rows={event.rows}"
            case ModelLoaded():
                why = f" ({event.precision_why})" if event.precision_why else ""
                return f"Model: {event.parameters / 1e6:.1f}M parameters, on {event.device} in {event.precision}{why}"
            case DataPrepared():
                return (
                    f"Loading instruction dataset: {event.source}\nTraining examples: {event.train_examples}"
                )
            case FitStarted():
                onward = f", resuming from step {event.step}" if event.step else ""
                return f"Starting SFT for {event.last_step} steps{onward}"
            case CheckpointSaved():
                return f"Saved checkpoint: {event.path}"
            case FitEnded() if event.ending is not Ending.FINISHED:
                message = event.ending.message(f"at step {event.step}")
                return message[:1].upper() + message[1:]
            case ModelSaved():
                return f"SFT complete. Final checkpoint: {event.pt or event.path}"
            case Notice() | MemoryEased():
                return event.text
            case Judged():
                return f"{event.kind} at step {event.step}: {event.reason}. Advice: {event.advice}"
            case Warned():
                return f"warning: {event.text}"
            case RunStarted() | FitEnded() | Progressed() | TextDelta():
                return ""
            case _:
                assert_never(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        self._text.close()
        if error is None:
            self.sync()


def _step_line(event: StepDone) -> str:
    """Return a step as ``step=10 loss=1.2345 lr=9.511e-06 response_tokens/s=512 padding=9% memory=2.10GB of_peak=31%``."""
    speed = event.response_tokens / max(event.seconds, 1e-9)
    padding = event.padding_tokens / max(1, event.padding_tokens + event.tokens)
    used = "" if event.utilization is None else f" of_peak={event.utilization:.0%}"
    text = " text" if event.text_tokens else ""
    memory = f" memory={event.peak_memory_bytes / 1e9:.2f}GB" if event.peak_memory_bytes else ""
    return (
        f"step={event.step} loss={event.loss:.4f}{_beside(event)} lr={event.learning_rate:.3e} response_tokens/s={speed:.0f} "
        f"padding={padding:.0%}{memory}{used}{text}"
    )


def _beside(event: StepDone) -> str:
    named = {"objective": event.objective, "router_aux_loss": event.router_aux_loss}
    return "".join(f" {name}={value:.4f}" for name, value in named.items() if value is not None)


def _heldout_line(event: HeldoutDone) -> str:
    """Return ``step=10 heldout_loss=1.2345 rows=40``, and how even experts are used in the least even layer of each measure.

    Behind it there is a line for each answer that was kept.
    """
    load = ExpertLoad.worst(event.experts)
    experts = (
        f" busiest_expert={load.busiest:.0%} unused_experts={load.unused:.0%} expert_entropy={load.entropy:.2f}"
        if load
        else ""
    )
    line = f"step={event.step} heldout_loss={event.loss:.4f} rows={event.rows}{experts}"
    if (given := event.given) is None:
        return line
    line += f" measure={given.measure.replace(' ', '_')} score={given.score:.4f} right={given.right} of={given.rows}"
    answers = (f"\nanswer {one.row}: {json.dumps(one.text, ensure_ascii=False)}" for one in given.given)
    return line + "".join(answers)


@dataclass(frozen=True, slots=True)
class Lines:
    """The complete lines of a file, each a JSON object, with its text and end; and the number of incomplete ones."""

    found: tuple[tuple[str, Mapping[str, object]], ...]
    damaged: int

    def message(self, path: Path) -> str:
        """Describe the skipped lines; empty if all are complete."""
        if not self.damaged:
            return ""
        what = "a line that is" if self.damaged == 1 else f"{self.damaged} lines that are"
        return f"{path}: {what} incomplete, as after a kill or on a full disk, skipped"


def read_lines(path: Path) -> Lines:
    """Read a file of JSON objects; a line that is torn, or not one, is counted and left out."""
    pieces = path.read_bytes().split(b"\n")
    lines = [*map(_parsed, pieces[:-1])]
    whole = tuple(line for line in lines if line is not None)
    return Lines(found=whole, damaged=len(lines) - len(whole) + bool(pieces[-1]))


def _parsed(line: bytes, errors: str = "strict") -> tuple[str, Mapping[str, object]] | None:
    try:
        text = line.decode("utf-8", errors)
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return (text + "\n", value) if isinstance(value, dict) else None


def end_torn_line(path: Path) -> str:
    """Remove an incomplete last line that a crash left; return the notice about it."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        storage.disk.truncate(path, content.rfind(b"\n") + 1)
        return Lines(found=(), damaged=1).message(path)
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
        elif kind == "EarlierDone" and event.get("is_end"):
            continue  # it is measured with the model of each end
        elif not (is_later or kind in (None, "FitEnded") or (is_measured_again and kind == "Judged")):
            yield text


def read_events(run: RunFolder) -> Iterator[Event]:
    """Yield the events logged so far, none without a log; logs of other versions are read as well.

    A line that a crash has torn and an event of a class that is not known are left out. A field that is missing, or of another
    type, is its default; one without a default is NaN, 0, "", or what else is empty.

    Raises:
        StorageError: The log is there and cannot be read.
    """
    for line in _lines_so_far(run.events):
        if (found := _parsed(line, "replace")) and (event := _event_of(found[1])):
            yield event


def _lines_so_far(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror or error}",
            hint="see to its permissions and the disk",
            location=Location(file=str(path)),
        ) from error


def _event_of(record: Mapping[str, object]) -> Event | None:
    name = str(record.get("event"))
    if name not in _KINDS:
        return None
    values: dict[str, Any] = {}
    for field, form, nothing in _forms(name):
        value = record.get(field, record.get(_FORMER_NAMES.get(field, "")))
        is_plain = type(value) is form and form in {float, bool}
        values[field] = value if is_plain else _converted(value, form, nothing)
    return _KINDS[name](**values)


@functools.cache
def _forms(name: str) -> tuple[tuple[str, Any, object], ...]:
    """Return the name and type of each field of a class of events, and what stands for a value that is missing."""
    types = get_type_hints(_KINDS[name])
    return tuple(
        (
            field.name,
            types[field.name],
            _empty(types[field.name]) if field.default is MISSING else field.default,
        )
        for field in fields(_KINDS[name])
    )


def _empty(form: Any) -> object:  # noqa: ANN401 - a class, or several
    return math.nan if form is float else Ending.FINISHED if form is Ending else form()


def _converted(value: object, form: Any, nothing: object) -> object:  # noqa: ANN401 - a class, or several
    try:
        return as_form(value, form)
    except FormError:
        return nothing


def is_unstarted(settings: RunSettings) -> bool:
    """Return whether the run called ``settings.name`` is there and came to an end before its first step.

    A wrong file name does that. The name is then still free for the command that is right.
    """
    if settings.name is None:
        return False
    run = RunFolder(Path(settings.root) / settings.name)
    return run.about.is_file() and not _has_logged(run, StepDone | FitEnded)


def has_begun(run: RunFolder) -> bool:
    """Return whether the run has taken a step."""
    return _has_logged(run, StepDone)


def _has_logged(run: RunFolder, signs: type[Event] | UnionType) -> bool:
    return run.checkpoints.exists() or any(isinstance(event, signs) for event in read_events(run))


@contextmanager
def forgotten_if_unstarted(
    run: RunFolder, emit: EventSink, *, is_new: bool, is_named: bool
) -> Iterator[None]:
    """Delete a new run's folder if the block fails before the first step.

    That is a run that the block began (``is_new``), and not one that ran out of memory: that can be resumed elsewhere. One that
    somebody has named keeps its log, unless it was asked for wrongly, as with a time that is too short.
    """
    try:
        yield
    except ResourceError:
        raise
    except SftError as error:
        if is_new and (not is_named or isinstance(error, UsageError)) and not has_begun(run):
            with suppress(OSError):  # what is left can be started again
                storage.discard(run.path)
            emit(Notice(text=f"removed {run.path}: the run ended before its first step"))
        raise
