"""What is compared: ``AXIS=V1,V2,...`` to a settings key and its values. Needs no torch.

A kind of axis is a row of ``KINDS``; every settings key that is not one of them is compared by the last row.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sftcli.config.fields import value_from_text
from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.errors import Location, UsageError
from sftcli.suggest import did_you_mean

FLAG = "--compare"
EACH_LEFT_OUT = "each-left-out"
ALL_SOURCES = "all sources"
_EXAMPLES = (
    "such as rows=25%,50%,100%, model=A,B, source=each-left-out, lr=1e-4,3e-4 or training.batch_size=8,16"
)
_SHORT = {"lr": "training.learning_rate"}
# Sections and keys whose values cannot be compared by a held-out loss after equally many steps, and why.
_REFUSED: Mapping[str, str] = {
    "run.": "changes no loss",
    "sampling.": "changes no loss",
    "checkpoint.": "changes no loss",
    "training.max_steps": "is the same for all runs",
    "training.epochs": "is the same for all runs",
    "training.seed": "is compared with --seeds N",
    "training.processes": "changes no loss",
    "training.context_processes": "changes no loss",
    "training.early_stopping_evals": "would end runs at different steps",
    "data.train_share": "is compared as rows=25%,100%",
    "data.leave_out": "is compared as source=each-left-out",
    "adapter.start_from": "is another model: train from it in runs of their own",
}
_SAME_HELDOUT = frozenset({"data.order", "data.text_fraction", "data.share_seed"})  # of the section data
_COST_NOTHING = frozenset(  # settings that leave the time of a step as it is
    f"training.{name}"
    for name in (
        "learning_rate", "schedule", "min_learning_rate_fraction", "decay_fraction", "warmup_steps", "warmup_fraction",
        "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm",
    )
) | {"data.order", "data.share_seed"}  # fmt: skip
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)%")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class Measure(StrEnum):
    """What is measured on the held-out rows."""

    LOSS = "loss"  # nats per response token
    BITS = "bits_per_byte"  # of the response text, so that tokenizers compare


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisValue:
    """One value: as it was typed, and what the key is set to."""

    text: str
    setting: object

    @property
    def slug(self) -> str:
        """The value as a part of a run's name."""
        return _NOT_IN_NAMES.sub("-", self.text).strip("-.")[-32:].strip("-.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisKind:
    """A kind of comparison.

    Attributes:
        word: What is typed; "" for any settings key.
        key: The settings key; "" where the word is the key.
        read: Makes the value of a word, given the key.
        has_baseline: Whether runs are compared with the first one instead of with the best one.
        costs_alike: Whether a step takes equally long with each value.
    """

    word: str
    key: str
    read: Callable[[str, str], object]
    has_baseline: bool = False
    costs_alike: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What is compared."""

    kind: AxisKind
    key: str
    values: tuple[AxisValue, ...]

    @property
    def name(self) -> str:
        """The axis for people."""
        return self.kind.word or self.key

    @property
    def costs_alike(self) -> bool:
        """Whether a step takes equally long with each value."""
        return self.kind.costs_alike or self.key in _COST_NOTHING

    @property
    def measure(self) -> Measure:
        """What the runs are compared by: bits per byte where they may have different tokens."""
        return Measure.BITS if self.key.startswith("model.") else Measure.LOSS


def parse_axis(text: str, settings: Settings) -> Axis:
    """Return what ``text``, the argument of ``--compare``, asks for; ``settings`` are those of all runs.

    Raises:
        UsageError: It is no axis, or has not at least two values that differ and can be compared.
    """
    word, equals, rest = text.partition("=")
    words = [part.strip() for part in rest.split(",") if part.strip()]
    if not equals or not words:
        raise _usage(f"{FLAG} {text!r} has no axis and values", f"write {FLAG} AXIS=V1,V2,... {_EXAMPLES}")
    kind, key = _find_kind(word.strip())
    if kind.word == "source":
        values = _left_out_in_turn(words, settings)
    else:
        values = tuple(AxisValue(text=one, setting=kind.read(one, key)) for one in words)
    if len(values) < 2:
        raise _usage(f"{FLAG} {text!r} has one value; it needs two or more", f"{_EXAMPLES}")
    seen: list[object] = []
    for value in values:
        if value.setting in seen:
            raise _usage(f"{FLAG} {text!r} has the value {value.text} twice")
        seen.append(value.setting)
    return Axis(kind=kind, key=key, values=values)


def _find_kind(word: str) -> tuple[AxisKind, str]:
    if word in KINDS:
        return KINDS[word], KINDS[word].key
    key = _SHORT.get(word, word)
    if key not in FIELDS:
        by_last_part = [full for full in FIELDS if full.rpartition(".")[2] == key.replace("-", "_")]
        if len(by_last_part) != 1:
            near = did_you_mean(word, [*KINDS, *_SHORT, *FIELDS])
            raise _usage(f"{FLAG}: there is no axis {word!r}", near or _EXAMPLES)
        key = by_last_part[0]
    for refused, why in _REFUSED.items():
        if key == refused or (refused.endswith(".") and key.startswith(refused)):
            raise _usage(f"{FLAG}: {key} {why}", _EXAMPLES)
    if key.startswith("data.") and key not in _SAME_HELDOUT:
        raise _usage(
            f"{FLAG}: {key} changes the held-out rows too, so losses would be of different rows",
            "train runs of their own, and score them on rows that you name: sft eval RUN --data FILE",
        )
    for kind in KINDS.values():
        if kind.key == key:
            return kind, key
    return _ANY_KEY, key


def _read_share(text: str, _key: str) -> float:
    found = _PERCENT.fullmatch(text)
    share = float(found[1]) / 100 if found else None
    if share is None or not 0 < share <= 1:
        raise _usage(
            f"{FLAG} rows={text}: it must be a percentage, more than 0% and at most 100%",
            f"such as {FLAG} rows=12%,25%,50%,100%",
        )
    return share


def _left_out_in_turn(words: Sequence[str], settings: Settings) -> tuple[AxisValue, ...]:
    already = settings.data.leave_out
    names = [name for name in dict.fromkeys(settings.data.sources) if name not in already]
    if words != [EACH_LEFT_OUT]:
        raise _usage(f"{FLAG} source={','.join(words)}: the one value is {EACH_LEFT_OUT}")
    if len(names) < 2:
        raise _usage(
            f"{FLAG} source={EACH_LEFT_OUT} needs two sources or more, and there {'is one' if names else 'are none'}",
            "name each file with a --data of its own",
        )
    left_out = (AxisValue(text=f"without {name}", setting=(*already, name)) for name in names)
    return (AxisValue(text=ALL_SOURCES, setting=already), *left_out)


def _read_text(text: str, _key: str) -> object:
    return text


def _read_setting(text: str, key: str) -> object:
    return value_from_text(FIELDS[key], text)


_ANY_KEY = AxisKind(word="", key="", read=_read_setting)
KINDS: Mapping[str, AxisKind] = {
    kind.word: kind
    for kind in (
        AxisKind(word="rows", key="data.train_share", read=_read_share, costs_alike=True),
        AxisKind(word="model", key="model.name", read=_read_text),
        AxisKind(word="source", key="data.leave_out", read=_read_text, has_baseline=True, costs_alike=True),
    )
}


def _usage(text: str, hint: str = "") -> UsageError:
    return UsageError(text, hint=hint, location=Location(key=FLAG))
