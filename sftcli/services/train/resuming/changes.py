"""Which settings may differ between the start of a run and its resumption, and how they do. Needs no torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.config.schema.training import Parallel, TrainingSettings
from sftcli.errors import MismatchError, UsageError
from sftcli.events import Event, Notice, Warned
from sftcli.services.runs.folder import LENGTH, RunFolder
from sftcli.suggest import did_you_mean

START = "the adapter it goes on from"  # name of a fingerprint
REPLAYED_ROWS = "replayed rows"  # the same, of rows of earlier runs
_OF_DATA = ("data rows", REPLAYED_ROWS)  # fingerprints that differ where the user lets ``data`` differ
# Keys that move no weight: they may differ from what a run was started with.
CHANGEABLE = frozenset(
    {"training.log_every_steps", "training.on_spike", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best",
     "checkpoint.keep_every_steps", "checkpoint.in_background"}
)  # fmt: skip
IGNORED_SECTIONS = ("run.", "sampling.")  # where the run is, and what is done with it afterwards
_IGNORED = {
    "model.trust_remote_code",  # is asked for anew; the weights and their commit are compared anyway
    "training.processes",  # is told as a fact of the machine
    "training.context_processes",  # is too
    "training.parallel",  # only where the numbers are
    "training.shard_processes",
}
SETTING, MACHINE = "setting ", "machine "
# What the stored weights and optimizer fit to: no flag lets it differ.
FIXED_SECTIONS = ("model.", "adapter.")
OPEN = frozenset({"model.attention"})  # in these sections, and moves numbers alone
FIXED = frozenset(
    {
        "training.train_embeddings", "training.train", "training.freeze", "training.optimizer", "training.max_minutes", "model",
        "tokenizer and template", START,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Differences from the fingerprints of a checkpoint, each as name -> (then, now)."""

    harmless: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # settings that move no weight
    # What follows is right, but not bit for bit what would have followed there.
    machine: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    forced: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # the user said so

    def by_kind(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Return them under the names that ``run.json`` and ``--json`` have for them."""
        return {
            "changes": dict(self.harmless),
            "machine": dict(self.machine),
            "allowed": dict(self.forced),
        }

    def message(self) -> list[Event]:
        """Return what a person should hear of them."""
        heard: list[Event] = [
            Notice(text=f"{name} was {old}, is {new} from here on")
            for name, (old, new) in self.harmless.items()
        ]
        if self.machine:
            pairs = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in self.machine.items())
            heard.append(
                Warned(text=f"{pairs}: the run continues, but not bit for bit as it would have there")
            )
        heard += [
            Warned(
                text=f"{name} was {_short(old)}, is {_short(new)}, as allowed: the result differs from an uninterrupted run"
            )
            for name, (old, new) in self.forced.items()
            if name not in LENGTH  # see ``longer.end_text``
        ]
        return heard


def open_again(changes: Changes, settings: TrainingSettings) -> set[str]:
    """Return the names of changed settings whose decisions are made again.

    ``training.parallel`` is compared nowhere, because a run goes on in any mode: where it is not auto, it has decided, and
    so has a size of replicas.
    """
    names = {*changes.forced, *changes.machine}
    is_open = settings.parallel is not Parallel.AUTO or settings.shard_processes > 0
    return names | {"training.parallel"} if is_open else names


def check_may_change(names: Sequence[str]) -> None:
    """Make sure that each of ``names`` is a settings key, or ``data``, that may change on resume.

    Raises:
        UsageError: One is not.
    """
    known = [key for key in FIELDS if _may_change(key)]
    for name in names:
        if not _may_change(name):
            raise UsageError(f"the checkpoint's weights depend on {name}, so it cannot change")
        if name not in (*known, "data"):
            hint = did_you_mean(name, ["data", *known]) or "name a settings key, or data"
            raise UsageError(f"--allow-change {name}: unknown key", hint=hint)


def compare_start(
    recorded: Settings, settings: Settings, *, allowed: Sequence[str] = (), finished: RunFolder | None = None
) -> Changes:
    """Return how ``settings`` differ from those of a run without a checkpoint.

    Raises:
        MismatchError: Something else that moves weights.
    """
    return find_changes(
        named_settings(recorded),
        named_settings(settings),
        allowed=allowed,
        what="the run",
        finished=finished,
    )


def find_changes(
    then: Mapping[str, str],
    now: Mapping[str, str],
    *,
    allowed: Sequence[str],
    what: str,
    finished: RunFolder | None = None,
) -> Changes:
    """Return how ``now`` differs from ``then``; both are fingerprints by name. See ``compare``.

    Raises:
        MismatchError: Something differs that moves weights and is not ``allowed``.
    """
    harmless: dict[str, tuple[str, str]] = {}
    machine: dict[str, tuple[str, str]] = {}
    forced: dict[str, tuple[str, str]] = {}
    refused: dict[str, tuple[str, str]] = {}
    had = named_settings(Settings()) | dict(then)  # a setting that is newer than the run had its default
    may = {*allowed, *(_OF_DATA if "data" in allowed else ())}
    may |= set(LENGTH) if may & set(LENGTH) else set()  # epochs are steps
    for name in sorted(now):
        pair = (had.get(name, "unset"), now[name])
        key = name.removeprefix(SETTING).removeprefix(MACHINE)
        if pair[0] == pair[1]:
            continue
        if name.startswith(MACHINE):
            machine |= {key: pair} if name in then else {}  # older checkpoints do not say
        elif key in CHANGEABLE:
            harmless[key] = pair
        elif key in may:
            forced[key] = pair
        else:
            refused[key] = pair
    if refused:
        shown = "; ".join(f"{key} was {_short(a)}, is {_short(b)}" for key, (a, b) in refused.items())
        raise MismatchError(
            f"{what} does not match: {shown}",
            hint=f"restore it, or start a new run under another --run NAME.{_way_on(refused, finished)} These may always change: "
            f"{', '.join(sorted(CHANGEABLE))}",
        )
    return Changes(harmless=harmless, machine=machine, forced=forced)


def _way_on(refused: Iterable[str], finished: RunFolder | None) -> str:
    """Return how a run goes on in spite of what is ``refused``, or nothing."""
    if finished is not None:
        return f" It trains longer with: sft resume {finished.argument} --max-steps STEPS, or --epochs N."
    keys = dict.fromkeys("data" if key in _OF_DATA else key for key in refused)
    ways = [f"--allow-change {key}" for key in keys if _may_change(key)]
    if not ways:
        return ""
    return f" To resume anyway, as a different run from here on, add to sft resume: {' '.join(ways)}."


def _may_change(key: str) -> bool:
    return key in OPEN or (key not in FIXED and not key.startswith(FIXED_SECTIONS))


def named_settings(settings: Settings) -> dict[str, str]:
    """Return the settings that decide what a run becomes, by name, as a checkpoint holds them."""
    return {
        f"{SETTING}{section}.{name}": json.dumps(value)
        for section, values in settings.model_dump(mode="json").items()
        for name, value in values.items()
        if not f"{section}.".startswith(IGNORED_SECTIONS) and f"{section}.{name}" not in _IGNORED
    }


def _short(value: str) -> str:
    is_hash = len(value) == 64 and all(digit in "0123456789abcdef" for digit in value)
    return f"sha256 {value[:12]}" if is_hash else value
