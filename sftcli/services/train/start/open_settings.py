"""Settings that nobody chose: decided from the rows and the model, told, recorded in the run, and found there again."""

import math
from collections.abc import Iterator

from sftcli.config.auto import (
    AUTO_KEYS,
    ORIGIN,
    Decided,
    decide_open,
    is_open,
    value_of,
    with_values,
)
from sftcli.config.resolve import DEFAULT_ORIGIN, to_toml
from sftcli.config.schema.settings import Settings
from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.figures import counted
from sftcli.modeling.formats.sizes import parameters_bytes
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.services.prepare.doubts import heldout_doubts
from sftcli.services.prepare.prepare import PreparedData
from sftcli.services.runs.folder import SETTING_ORIGINS, RunFolder, read_settings
from sftcli.storage import replace_file

TIMED_KEYS = ["training.max_steps", "training.max_minutes"]  # which a run that was given a time has decided
FEW_STEPS = 20  # of fewer a learning rate rises and falls before it has done much
SURE_STEPS = 50  # with so many it may be meant as a trial


def decide(settings: Settings, prepared: PreparedData, located: LocatedModel) -> Decided:
    """Fill in what is open in ``settings``."""
    dataset = prepared.dataset
    named = bool(settings.data.heldout_sources)
    return decide_open(
        settings,
        rows=len(dataset.train) + (0 if named else len(dataset.heldout)),
        parameters=parameters_of(located),
        heldout_fraction=dataset.about.heldout_fraction,
    )


def parameters_of(located: LocatedModel) -> int:
    """Return how many parameters the whole model has."""
    return parameters_bytes(located.folder) // 4


def decided_text(decided: Decided) -> str:
    """Return in one line what was decided and why, such as ``auto: 150 rows: batch size 8, 3 epochs, 20% held out``; empty for nothing."""
    settings = decided.settings
    words = {
        "training.batch_size": f"batch size {settings.training.batch_size}",
        "training.epochs": f"{settings.training.epochs:g} epochs",
        "data.heldout_fraction": f"{settings.data.heldout_fraction or 0:.0%} held out",
        "training.learning_rate": f"learning rate {settings.training.learning_rate:g}",
    }
    if settings.training.max_steps:
        del words["training.epochs"]
    by_reason: dict[str, list[str]] = {}
    for key, text in words.items():
        if key in decided.origins:
            by_reason.setdefault(decided.origins[key].removeprefix(ORIGIN), []).append(text)
    told = "; ".join(f"{reason}: {', '.join(texts)}" for reason, texts in by_reason.items())
    return f"{ORIGIN}{told}" if told else ""


def minutes_given(run: RunFolder) -> float | None:
    """Return the minutes that a run was given, once they are steps."""
    budget = run.record().budget if run.about.is_file() else None
    return None if budget is None else budget.seconds / 60


def record(run: RunFolder, decided: Decided) -> None:
    """Write what was decided into the run's settings, each with its reason."""
    if not decided.origins:
        return
    replace_file(run.config, to_toml(decided.settings).encode())
    SETTING_ORIGINS.write(run.origins, {**run.first_origins(), **decided.origins})


def recalled(settings: Settings, run: RunFolder) -> Settings:
    """Return ``settings`` with what ``run`` decided of that which is open in them, if it has the same settings otherwise."""
    try:
        recorded, origins = read_settings(run), run.first_origins()
    except (UsageError, NotFoundError, DataError):  # a start that was killed may leave anything
        return settings
    open_keys = [
        key
        for key in AUTO_KEYS
        if is_open(settings, key)
        and origins.get(key, "").startswith((ORIGIN, DEFAULT_ORIGIN))  # as older versions had it
    ]
    if settings.training.max_minutes is not None and settings.training.max_minutes == minutes_given(run):
        open_keys += TIMED_KEYS
    found = with_values(settings, {key: value_of(recorded, key) for key in open_keys})
    if "training.batch_size" in open_keys and found.training.batch_size is not None:
        micro = min(found.training.micro_batch_size, found.training.batch_size)
        found = with_values(found, {"training.micro_batch_size": micro})
    return found if as_started(found, run) == recorded else settings


def as_started(settings: Settings, run: RunFolder) -> Settings:
    """Return ``settings`` with the number of processes that ``run`` was started with, which moves nothing."""
    try:
        processes = read_settings(run).training.processes
    except (UsageError, NotFoundError, DataError):  # as above
        return settings
    return with_values(settings, {"training.processes": processes})


def doubts(
    asked: Settings,
    complete: Settings,
    *,
    train_rows: int,
    heldout_rows: int,
    replayed_rows: int = 0,
    is_timed: bool = False,
) -> Iterator[str]:
    """Yield why a run can hardly teach or prove anything, each with the flag that changes it.

    Args:
        asked: The settings before the rows were known, to tell whether steps or epochs were asked for.
        complete: The same with everything filled in.
        train_rows: To train on.
        replayed_rows: Of these, those of earlier runs.
        heldout_rows: Held out.
        is_timed: Whether the steps follow from a time.
    """
    training = complete.training
    steps, passes = training.max_steps, training.max_steps * training.rows_per_step / max(1, train_rows)
    if steps < FEW_STEPS:
        longer = (
            f"--max-steps {3 * FEW_STEPS}"
            if asked.training.max_steps and not is_timed
            else f"a --max-time {math.ceil(3 * FEW_STEPS / steps)} times as long"
            if is_timed
            else f"--epochs {math.ceil(3 * FEW_STEPS * training.rows_per_step / max(1, train_rows))}"
        )
        yield f"{counted(steps, 'step')} teach little; to train longer: {longer}"
    elif passes < 1 and steps < SURE_STEPS:
        yield f"the steps reach {passes:.0%} of the rows; to see all of them once: --epochs 1"
    yield from heldout_doubts(complete, train_rows=train_rows - replayed_rows, heldout_rows=heldout_rows)
