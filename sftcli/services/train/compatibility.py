"""Fingerprints of a run's inputs, and the check whether they have changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.config.schema.training import Parallel, TrainingSettings
from sftcli.errors import MismatchError, UsageError
from sftcli.events import Event, Notice, Warned
from sftcli.modeling.adapter.folder import WEIGHTS_FILE
from sftcli.modeling.formats.identity import exact_hash
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.services.machine import facts_of_training
from sftcli.services.prepare.prepare import PreparedData
from sftcli.services.runs.folder import RunFolder
from sftcli.suggest import did_you_mean
from sftcli.training.checkpoint.format import read_fingerprints

# Keys that move no weight: they may differ from what a run was started with.
CHANGEABLE = frozenset(
    {"training.log_every_steps", "training.on_spike", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best",
     "checkpoint.keep_every_steps", "checkpoint.in_background"}
)  # fmt: skip
IGNORED_SECTIONS = ("run.", "sampling.")  # where the run is, and what is done with it afterwards
_IGNORED = {
    "model.trust_remote_code",  # is asked for anew; the weights and their commit are compared anyway
    "training.processes",  # is told as a fact of the machine
    "training.parallel",  # only where the numbers are
}
_SETTING, _MACHINE = "setting ", "machine "
# What the stored weights and optimizer fit to: no flag lets it differ.
FIXED_SECTIONS = ("model.", "adapter.")
OPEN = frozenset({"model.attention"})  # in these sections, and moves numbers alone
_START = "the adapter it goes on from"
FIXED = frozenset(
    {
        "training.train_embeddings", "training.train", "training.freeze", "training.optimizer", "model", "tokenizer and template",
        _START,
    }
)  # fmt: skip


def fingerprints(settings: Settings, located: LocatedModel, prepared: PreparedData) -> dict[str, str]:
    """Return the fingerprints of a run by name: every setting, and hashes of the data, the tokenizer and the model."""
    machine = {f"{_MACHINE}{name}": value for name, value in facts_of_training(settings.training).items()}
    return (
        _named(settings)
        | machine
        | {
            "data": prepared.dataset.fingerprint,
            "data rows": f"{len(prepared.dataset.train)} + {len(prepared.dataset.heldout)} held out",
            "tokenizer and template": hashlib.sha256(
                str(prepared.tokenizer.fingerprint).encode()
            ).hexdigest(),
            "model": exact_hash(located.folder),
        }
        | _start(settings)
    )


def _start(settings: Settings) -> dict[str, str]:
    folder = settings.adapter.start_from
    return {} if folder is None else {_START: storage.file_sha256(Path(folder) / WEIGHTS_FILE)}


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
        ]
        return heard


def open_again(changes: Changes, settings: TrainingSettings) -> set[str]:
    """Return the names of changed settings whose decisions are made again.

    ``training.parallel`` is compared nowhere, because a run goes on in any mode: where it is not auto, it has decided.
    """
    names = {*changes.forced, *changes.machine}
    return names if settings.parallel is Parallel.AUTO else names | {"training.parallel"}


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


def compare(
    checkpoint: Path, now: Mapping[str, str], *, allowed: Sequence[str] = (), is_finished: bool = False
) -> Changes:
    """Return what has changed since ``checkpoint``.

    Args:
        checkpoint: It holds what it was made of.
        now: What ``fingerprints`` returns.
        allowed: Settings keys, or ``data``, of which the user says that they may differ.
        is_finished: The run does not go on, so nothing is said of how it would.

    Raises:
        MismatchError: Anything else differs that moves weights; each difference is shown.
    """
    then = read_fingerprints(checkpoint)
    return _changes(then, now, allowed=allowed, what=str(checkpoint), is_finished=is_finished)


def compare_start(
    recorded: Settings, settings: Settings, *, allowed: Sequence[str] = (), is_finished: bool = False
) -> Changes:
    """Return how ``settings`` differ from those of a run without a checkpoint.

    Raises:
        MismatchError: Something else that moves weights.
    """
    return _changes(
        _named(recorded), _named(settings), allowed=allowed, what="the run", is_finished=is_finished
    )


def compare_data(run: RunFolder, fingerprint: str, *, allowed: Sequence[str] = ()) -> None:
    """Make sure that the rows of a run that starts over are those that it had prepared.

    Raises:
        MismatchError: They are others.
    """
    then = run.data_fingerprint()
    if then is not None:
        _changes({"data": then}, {"data": fingerprint}, allowed=allowed, what="the run")


def _changes(
    then: Mapping[str, str],
    now: Mapping[str, str],
    *,
    allowed: Sequence[str],
    what: str,
    is_finished: bool = False,
) -> Changes:
    harmless: dict[str, tuple[str, str]] = {}
    machine: dict[str, tuple[str, str]] = {}
    forced: dict[str, tuple[str, str]] = {}
    refused: dict[str, tuple[str, str]] = {}
    had = _named(Settings()) | dict(then)  # a setting that is newer than the run had its default
    for name in sorted(now):
        pair = (had.get(name, "unset"), now[name])
        key = name.removeprefix(_SETTING).removeprefix(_MACHINE)
        if pair[0] == pair[1]:
            continue
        if name.startswith(_MACHINE):
            machine |= {key: pair} if name in then else {}  # older checkpoints do not say
        elif key in CHANGEABLE:
            harmless[key] = pair
        elif key in allowed or (key == "data rows" and "data" in allowed):
            forced[key] = pair
        else:
            refused[key] = pair
    if refused:
        shown = "; ".join(f"{key} was {_short(a)}, is {_short(b)}" for key, (a, b) in refused.items())
        ways = [f"--allow-change {key}" for key in refused if key != "data rows" and _may_change(key)]
        allow = (
            f" To resume anyway, as a different run from here on, add to sft resume: {' '.join(ways)}."
            if ways and not is_finished
            else ""
        )
        raise MismatchError(
            f"{what} does not match: {shown}",
            hint=f"restore it, or start a new run: sft train.{allow} These may always change: "
            f"{', '.join(sorted(CHANGEABLE))}",
        )
    return Changes(harmless=harmless, machine=machine, forced=forced)


def _may_change(key: str) -> bool:
    return key in OPEN or (key not in FIXED and not key.startswith(FIXED_SECTIONS))


def _named(settings: Settings) -> dict[str, str]:
    """Return the settings that decide what a run becomes, by name, as a checkpoint holds them."""
    return {
        f"{_SETTING}{section}.{name}": json.dumps(value)
        for section, values in settings.model_dump(mode="json").items()
        for name, value in values.items()
        if not f"{section}.".startswith(IGNORED_SECTIONS) and f"{section}.{name}" not in _IGNORED
    }


def _short(value: str) -> str:
    is_hash = len(value) == 64 and all(digit in "0123456789abcdef" for digit in value)
    return f"sha256 {value[:12]}" if is_hash else value
