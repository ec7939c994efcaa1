"""What four settings become where nobody chose them: they follow from the number of rows and the size of the model.

The recipe that the presets keep (32 rows a step, a learning rate of 1e-5, 2 % held out) is made for fifty thousand rows and
thousands of steps. On 150 rows it takes 14 steps and teaches nothing. So fewer rows get smaller steps and more passes, a larger
share of them is held out, so that a loss can be told from chance, and smaller models get larger rates, as they need: the preset
``quick`` trains 135M parameters at 3e-4, common recipes train one or two billion at 3e-5 to 3e-4 and seven at 1e-5 to 2e-5.
From one line of a table to the next, every value moves in one direction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

from sftcli.config.schema.adapter import ADAPTER_LEARNING_RATE
from sftcli.config.schema.settings import Settings

ORIGIN = "auto: "
AUTO_KEYS: Mapping[str, str] = {  # what each follows from, in words
    "training.batch_size": "the number of rows",
    "training.epochs": "the number of rows",
    "training.learning_rate": "the size of the model",
    "data.heldout_fraction": "the number of rows",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsRule:
    """What fewer than ``below`` rows get."""

    below: float
    batch_size: int
    epochs: float
    heldout_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRule:
    """The peak learning rate of a whole model with at most ``up_to`` parameters."""

    up_to: float
    learning_rate: float


ROWS_RULES = (
    RowsRule(below=100, batch_size=4, epochs=5, heldout_fraction=0.2),
    RowsRule(below=500, batch_size=8, epochs=3, heldout_fraction=0.2),
    RowsRule(below=2_000, batch_size=16, epochs=3, heldout_fraction=0.1),
    RowsRule(below=10_000, batch_size=16, epochs=3, heldout_fraction=0.05),
    RowsRule(below=inf, batch_size=32, epochs=3, heldout_fraction=0.02),
)
RATE_RULES = (
    RateRule(up_to=2e8, learning_rate=3e-4),
    RateRule(up_to=1e9, learning_rate=1e-4),
    RateRule(up_to=3e9, learning_rate=3e-5),
    RateRule(up_to=inf, learning_rate=1e-5),
)

SOURCE_RATES = (5e-6, 5e-5)  # between which the source recipe varies its rate of 1e-5


def rule_for_rows(rows: int) -> RowsRule:
    """Return what a training on ``rows`` gets, those that will be held out among them."""
    return next(rule for rule in ROWS_RULES if rows < rule.below)


def rate_for(parameters: int) -> float:
    """Return the learning rate of a whole model."""
    return next(rule.learning_rate for rule in RATE_RULES if parameters <= rule.up_to)


def unusual_rate(settings: Settings, parameters: int) -> Iterator[str]:
    """Yield what to know of the learning rate of a whole model, where it is far from usual."""
    rate, usual = settings.training.learning_rate, max(SOURCE_RATES[1], rate_for(parameters))
    if settings.adapter.is_on or rate is None or SOURCE_RATES[0] <= rate <= usual:
        return
    end, effect = ("lower", "it adapts slowly") if rate < usual else ("higher", "it may forget what it knew")
    between = f"{SOURCE_RATES[0]:g} to {usual:g}"
    yield f"learning rate {rate:g} is {end} than usual for a model of {_counted(parameters)} parameters ({between}): {effect}"


def value_of(settings: Settings, key: str) -> object:
    """Return the value of a settings key; None where it is unset."""
    section, _, name = key.partition(".")
    value: object = getattr(getattr(settings, section), name)
    return value


def with_values(settings: Settings, values: Mapping[str, object]) -> Settings:
    """Return ``settings`` with other values of some keys, which are known to be right."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        part = getattr(settings, section).model_copy(update={name: value})
        settings = settings.model_copy(update={section: part})
    return settings


def is_open(settings: Settings, key: str) -> bool:
    """Return whether ``key`` is still to be decided. Where held-out rows are named, there is no share of rows."""
    if key == "data.heldout_fraction" and settings.data.heldout_sources:
        return False
    return key in AUTO_KEYS and value_of(settings, key) is None


def described(settings: Settings, key: str) -> str:
    """Return where the value of an open ``key`` will come from, in words."""
    if key == "training.learning_rate" and settings.adapter.is_on:
        return f"{ORIGIN}{ADAPTER_LEARNING_RATE:g} for adapters"
    return f"{ORIGIN}follows from {AUTO_KEYS[key]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """Settings that are complete, and where each of those came from that were open."""

    settings: Settings
    origins: Mapping[str, str]


def decide_open(settings: Settings, *, rows: int, parameters: int, heldout_fraction: float | None) -> Decided:
    """Fill in what is open.

    Args:
        settings: What to complete.
        rows: Those that were kept, without held-out ones that were named.
        parameters: Of the whole model.
        heldout_fraction: The share that was held out.
    """
    rule = rule_for_rows(rows)
    counted, sized = f"{ORIGIN}{rows:,} rows", f"{ORIGIN}{_counted(parameters)} parameters"
    if settings.adapter.is_on:
        rate, sized = ADAPTER_LEARNING_RATE, f"{ORIGIN}an adapter"
    else:
        rate = rate_for(parameters)
    found: dict[str, tuple[object, str]] = {
        "training.batch_size": (rule.batch_size, counted),
        "training.epochs": (rule.epochs, counted),
        "training.learning_rate": (rate, sized),
        "data.heldout_fraction": (heldout_fraction, counted),
    }
    chosen = {key: pair for key, pair in found.items() if is_open(settings, key)}
    values = {key: value for key, (value, _) in chosen.items()}
    micro = settings.training.micro_batch_size
    if "training.batch_size" in chosen and micro > rule.batch_size:  # a bound on memory, not on the update
        values["training.micro_batch_size"] = rule.batch_size
    return Decided(
        settings=with_values(settings, values), origins={key: origin for key, (_, origin) in chosen.items()}
    )


def _counted(parameters: int) -> str:
    unit, letter = next(
        pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if parameters >= pair[0] or pair[0] == 1e3
    )
    return f"{parameters / unit:.3g}{letter}"
