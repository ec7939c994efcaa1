"""``run.json``: what a run says about itself. Each key has one writer; a run of an older version lacks the newer ones."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from sftcli.config.auto import ORIGIN
from sftcli.errors import DataError
from sftcli.figures import duration, whole_duration
from sftcli.own_files import FormError, OwnFile, as_form
from sftcli.paths import PathText

TIME = "training.max_minutes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The weights that a run starts from; where they are ``needed``, its checkpoints are not all that a model folder holds."""

    name: PathText = ""
    revision: str | None = None
    needed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """An earlier run as ``run.json`` of a later one has it: its name, where it was, and the hash of its rows."""

    run: PathText
    path: PathText
    data: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What was measured or tried at the start and moves numbers. Each is None while it is open.

    Whoever decides one takes what is recorded, or refuses: never another.
    """

    precision: str | None = None  # of matrix products: bf16, fp16 or fp32
    precision_why: str | None = None  # in a few words
    attention: str | None = None  # what transformers calls it, before documents are kept apart
    layers: tuple[str, ...] | None = (
        None  # kinds of modules that run in a faster form, and whose; () for none
    )
    packing: str | None = None  # how documents of one row are kept apart (``RowSharing``)
    kernel: str | None = (
        None  # what computes attention (``attention_in_words``), which depends on the machine too
    )
    head: str | None = None  # where the head runs (``HeadLoss``)
    weights: str | None = None  # whether several processes share them out (``WeightSharing``)

    def __post_init__(self) -> None:
        if self.precision not in {None, "bf16", "fp16", "fp32"}:
            raise ValueError(f"precision is {self.precision!r}, and not bf16, fp16 or fp32")

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self) | {"layers": None if self.layers is None else list(self.layers)}

    @staticmethod
    def from_json(value: object, *, where: str) -> "Decisions":
        """Return the inverse of ``to_json``; decisions unknown to this version are dropped.

        Raises:
            DataError: It is nothing of that kind.
        """
        try:
            found: Decisions = as_form(value, Decisions, "decisions")
        except FormError as error:
            raise DataError(f"{where}: {error}") from error
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The end of a training that was given a time, and what it was counted from."""

    seconds: float
    steps: int
    allowed: int  # that the time allows
    decided_by: str  # the settings key that ends the training: its time, or one that ends it before
    reserve_seconds: float
    expected_seconds: float
    step_seconds: float
    evaluation_seconds: float
    save_seconds: float
    used_seconds: float | None = None  # once it has ended

    @property
    def origin(self) -> str:
        """Where the number of steps comes from, as ``--print-config`` says it."""
        return f"{ORIGIN}{whole_duration(self.seconds)}, {duration(self.step_seconds)} a step"

    def in_words(self, passes: float) -> str:
        """Return what was decided, in a line."""
        time, steps = whole_duration(self.seconds), f"{self.steps:,} steps"
        each = f"of {duration(self.step_seconds)}"
        if self.decided_by != TIME:
            return (
                f"{self.decided_by} ends the training after {steps} {each}: {time} would be {self.allowed:,}"
            )
        kept = f"{whole_duration(self.reserve_seconds)} kept in reserve"
        return f"{time} end the training after {steps} {each}, {passes:.2g} passes over the rows, {kept}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A later start: when, from which step, and what differed from the checkpoint, each as name -> (then, now)."""

    at: str
    step: int
    changes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    machine: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    allowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What ``run.json`` holds."""

    started_at: str = ""  # ISO 8601, UTC
    command: str = ""
    version: str = ""  # of sft
    torch: str = ""
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)  # with their versions
    base: Base | None = None
    lineage: tuple[Ancestor, ...] | None = None  # None where the run has not got so far, or is older
    decisions: Decisions | None = None
    machine: Mapping[str, str] = field(default_factory=dict)  # what the newest start found, by name
    trusted_code: Mapping[str, str] = field(
        default_factory=dict
    )  # hashes of what may run of the model's own code
    budget: Budget | None = None  # of a run that was given a time
    resumed: tuple[Resumption, ...] = ()
    changed: Mapping[str, object] = field(
        default_factory=dict
    )  # settings that a later start has changed, with their values
    weights_removed: bool = False  # once a comparison has scored the run


RECORD = OwnFile(
    form=RunRecord,
    hint="the run's checkpoints/ and final/ are not touched by that: a folder in them can be named in place of the run",
)
