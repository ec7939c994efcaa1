"""What happens during a command, as values. Services and the trainer emit them; views and logs receive them.

The order of a training run is::

    Notice* DataPrepared ModelLoaded EarlierDone* HeldoutDone? FitStarted
        (StepDone HeldoutDone? CheckpointSaved?)* FitEnded HeldoutDone? EarlierDone* ModelSaved?

with ``Notice`` and ``Warned`` allowed anywhere, ``MemoryEased`` before a step, and ``Judged`` behind a ``StepDone`` or
``HeldoutDone``. Events hold plain numbers and strings only, so a receiver can neither change a run nor keep its memory
alive.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol


class Ending(StrEnum):
    """Why training ended, in the words of every view, log and report.

    ``is_complete``: nothing is left to train, so that there is a final model.
    """

    words: str
    reason: str  # behind the words; "" where they say it all
    is_complete: bool

    FINISHED = "finished", "finished", "", True
    PLATEAU = "plateau", "stopped early", "held-out loss stopped improving", True
    STOPPED = "stopped", "stopped", "", False  # on request

    def __new__(cls, value: str, words: str, reason: str, is_complete: bool) -> "Ending":
        """Return the member of ``value``."""
        member = str.__new__(cls, value)
        member._value_, member.words, member.reason, member.is_complete = value, words, reason, is_complete
        return member

    def message(self, place: str) -> str:
        """Return how training ended at ``place``, such as ``stopped early at step 20: held-out loss stopped improving``."""
        return f"{self.words} {place}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One line for the user: what is being done, or what was decided and why."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something the user should know that does not stop the command."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A run folder was made or opened. Everything that follows belongs to it."""

    run: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Progress of a long task other than training: reading, rendering, downloading, evaluating, generating.

    ``total`` is 0 while it is not known. The last event of a task has ``done == total``. ``later_seconds`` is an estimate of what the
    command does behind the task; infinite where it cannot be known yet, and then neither can the time that is left.
    """

    task: str
    done: int
    total: int
    unit: str = "rows"
    later_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPrepared:
    """Rows were read, rendered and checked, or found in the cache (``cached``)."""

    source: str  # names of the sources
    schema: str  # detected formats
    rows: int
    kept: int
    rejected: dict[str, int]  # reason -> rows
    train_examples: int
    heldout_examples: int
    train_tokens: int
    response_tokens: int  # of the training examples
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded:
    """A model is in memory."""

    name: str
    parameters: int
    trainable: int
    device: str
    precision: str  # what the matrix products run in: "bf16" or "fp32"
    precision_why: str = ""  # what decided that, in a few words
    peak_flops: float = 0.0  # operations per second of a large matrix product, measured; 0 where it was not


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStarted:
    """Training starts or resumes at ``step`` finished steps."""

    step: int
    last_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimizer step was taken, or skipped because its loss or gradient was not finite (``applied`` is false)."""

    step: int  # steps finished so far; the first is 1
    loss: float  # nats per response token over the global batch
    grad_norm: float  # before clipping
    learning_rate: float
    applied: bool
    epoch: float  # passes over the training examples so far
    response_tokens: int  # those with loss; on a step of pretraining text nearly all
    tokens: int  # fed to the model, padding excluded
    padding_tokens: int
    seconds: float  # wall time of this step, data wait included
    peak_memory_bytes: int  # 0 where the machine cannot tell
    text_tokens: int = 0  # those of pretraining text: a step has only such, or none
    examples: int = 0  # in the global batch
    rows: int = 0  # that the examples were put into; fewer where they are packed
    micro_batches: int = 0
    exchanged_bytes: int = (
        0  # of gradients that each of several processes gave to be summed, and what attention swapped
    )
    utilization: float | None = (
        None  # share of the measured peak of matrix products; None where there is none
    )
    objective: float | None = None  # what is minimized, per response token; None where that is ``loss``
    router_aux_loss: float | None = (
        None  # of routed experts, without its coefficient; None where it is not trained
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEased:
    """Memory ran out in step ``step``; it and all later steps run in a way that needs less memory."""

    step: int
    micro_batch_size: int  # rows; 0 where they are packed
    micro_batch_tokens: int  # most positions of a micro-batch of packed rows; 0 elsewhere
    micro_batches: int  # of this global batch
    gradient_checkpointing: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The loss curves up to ``step`` give reason for a warning."""

    step: int
    kind: str  # overfitting, degrading, plateau or spike
    reason: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """How evenly the router of a layer spread its tokens over the experts."""

    busiest: float  # share of the choices that went to one expert; 1 over their number where all get the same
    unused: float  # share of the experts that no token chose
    entropy: float  # of the shares, as a part of its largest value: 1 where all are alike, 0 for one expert

    @staticmethod
    def worst(experts: Mapping[str, object]) -> "ExpertLoad | None":
        """Return the least even value of each kind over the layers of ``HeldoutDone.experts``; None without such layers."""
        names = {"busiest", "unused", "entropy"}  # a log can hold anything
        loads = [load for load in experts.values() if isinstance(load, Mapping) and names <= load.keys()]
        if not loads:
            return None
        return ExpertLoad(
            busiest=max(load["busiest"] for load in loads),
            unused=max(load["unused"] for load in loads),
            entropy=min(load["entropy"] for load in loads),
        )

    def __str__(self) -> str:
        """Return ``busiest 41%, unused 3%, entropy 0.93``."""
        return f"busiest {self.busiest:.0%}, unused {self.unused:.0%}, entropy {self.entropy:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAnswer:
    """What the model answers to a held-out prompt now."""

    row: str  # its file and line
    prompt: str  # the end of it, where it is long
    expected: str
    text: str
    score: float  # 0 to 1, by the measure of its ``HeldoutAnswers``
    is_cut: bool = False  # it had not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutAnswers:
    """Answers to the same held-out prompts at each evaluation, and how many are right."""

    measure: str  # the check that fits the expected answers; "exact match" where none does
    rows: int  # that were answered
    right: int  # wholly
    score: float  # mean of the scores of all, 0 to 1
    given: tuple[GivenAnswer, ...]  # of the first few, for people

    @staticmethod
    def of(found: Mapping[str, Any]) -> "HeldoutAnswers | None":
        """Return those of ``HeldoutDone.answers``; None where there are none, or what a log holds is something else."""
        try:
            given = tuple(GivenAnswer(**one) for one in found["given"])
            answers = HeldoutAnswers(**{**found, "given": given})
        except (KeyError, TypeError):
            return None
        numbers = (answers.rows, answers.right, answers.score, *(one.score for one in given))
        return answers if all(isinstance(number, int | float) for number in numbers) else None

    def as_fields(self) -> dict[str, object]:
        """Return what ``of`` reads, as a log has it."""
        return asdict(self) | {"given": [asdict(one) for one in self.given]}

    def in_words(self) -> str:
        """Return ``label 5 of 8 right``, with the mean score where answers are right in part."""
        mean = "" if math.isclose(self.score * self.rows, self.right) else f", {self.score:.0%} on average"
        return f"{self.measure} {self.right} of {self.rows} right{mean}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutDone:
    """The held-out examples were scored. ``loss`` is nats per response token; ``step`` is finished steps."""

    step: int
    loss: float
    response_tokens: int
    seconds: float
    rows: int = 0  # that were scored; logs of older versions do not tell
    # Standard error, over rows, of the fall of ``loss`` since the first measurement; None at that one, and of few rows.
    fall_error: float | None = None
    # By layer with routed experts, as ``ExpertLoad`` has it.
    experts: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, object] = field(default_factory=dict)  # as ``HeldoutAnswers`` has it; of none, nothing
    answer_seconds: float = 0.0  # of ``seconds``
    by_check: bool = False  # whether the score of the answers says which checkpoint is the best

    @property
    def given(self) -> HeldoutAnswers | None:
        """What was answered."""
        return HeldoutAnswers.of(self.answers)

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller for a better checkpoint, by what the run chooses the best one by."""
        given = self.given if self.by_check else None
        return rank_of(self.loss, None if given is None else given.score)


def rank_of(loss: float, score: float | None) -> tuple[float, float]:
    """Return a pair that is smaller for a higher ``score``, and of equal scores, or without any, for a lower ``loss``."""
    return (0.0 if score is None else -score, loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierDone:
    """Rows that an earlier run held out were scored, before the first step or (``is_end``) with the final model.

    ``loss`` is nats per response token. A row is right where each of its response tokens is the most likely one, so that
    greedy decoding writes its answers as they are. The last four compare with the same rows before the first step.
    """

    run: str
    step: int
    is_end: bool
    loss: float
    response_tokens: int
    seconds: float
    rows: int
    answered: int  # of these rows; the others are text, which no answer ends
    right: int
    lost: int = 0  # right before, and not now
    gained: int = 0  # the other way round
    rise: float = 0.0  # of ``loss``
    rise_error: float | None = None  # its standard error, over rows; None of few rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk: it survives a crash from now on."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitEnded:
    """Training ended at ``step``."""

    step: int
    ending: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSaved:
    """The final model folder is complete on disk."""

    path: str
    pt: str = ""  # file for the model's own pipeline, where it has one


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """A piece of generated text, as it becomes known."""

    text: str


Event = (
    Notice
    | Warned
    | RunStarted
    | Progressed
    | DataPrepared
    | ModelLoaded
    | FitStarted
    | StepDone
    | MemoryEased
    | Judged
    | HeldoutDone
    | EarlierDone
    | CheckpointSaved
    | FitEnded
    | ModelSaved
    | TextDelta
)


def event_record(event: Event) -> dict[str, object]:
    """Return an event as ``events.jsonl`` and ``--log-format jsonl`` hold it: its kind, the time (ISO 8601, UTC), its fields.

    JSON has no NaN: a number that is not finite becomes None.
    """
    time = datetime.now(tz=UTC).isoformat(timespec="milliseconds")
    fields = {name: _finite(value) for name, value in asdict(event).items()}
    return {"event": type(event).__name__, "time": time} | fields


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EventSink(Protocol):
    """Receives every event once, in order, on the thread that runs the service. Must not block and must not raise."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        ...


class StopFlag(Protocol):
    """Tells whether the user has requested a stop."""

    def requested(self) -> bool:
        """Return true once a stop was requested; never turns false again."""
        ...

    def save_requested(self) -> bool:
        """Return true once for each requested checkpoint without a stop."""
        ...


class NeverStop:
    """The flag of a caller who cannot be interrupted, such as a test or a notebook."""

    def requested(self) -> bool:
        """Return false."""
        return False

    def save_requested(self) -> bool:
        """Return false."""
        return False


@dataclass(frozen=True, slots=True)
class Session:
    """The context of a running command: the event sink and the stop flag."""

    emit: EventSink
    stop: StopFlag


def fan_out(*sinks: EventSink) -> EventSink:
    """Return a sink that hands each event to every one of ``sinks``, in this order."""

    def emit(event: Event, /) -> None:
        for sink in sinks:
            sink(event)

    return emit


def unheard(_: Event, /) -> None:
    """Take an event that somebody else tells of, or nobody."""
