"""What it takes to go on with a run: which checkpoint, and whether everything is still what it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from sftcli import storage
from sftcli.config.schema import CheckpointSettings
from sftcli.config.sources import Settings
from sftcli.errors import MismatchError, NotFoundError, StorageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.locate import LocatedModel
from sftcli.services.prepare import PreparedData
from sftcli.services.run_folder import RunFolder, write_json
from sftcli.training.checkpoint import gigabytes
from sftcli.training.checkpoint_files import newest_good, read_fingerprints, verify
from sftcli.training.checkpoint_names import list_checkpoints, step_of
from sftcli.training.state import Snapshot

# Keys that move no weight: they may differ from what a run was started with.
CHANGEABLE = frozenset(
    {"training.log_every_steps", "checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_best",
     "checkpoint.keep_every_steps", "checkpoint.in_background"}
)  # fmt: skip
IGNORED_SECTIONS = ("run.", "sampling.")  # where the run is, and what is done with it afterwards
_CONSENT = "model.trust_remote_code"  # is asked for anew; the weights and their commit are compared anyway
_SETTING = "setting "


def choose_checkpoint(run: RunFolder, step: int | None, emit: EventSink) -> Path:
    """Return the checkpoint of ``step``, or the newest one that verifies.

    Raises:
        NotFoundError: There is none.
        DataError: The one asked for, or every one, is damaged.
    """
    if step is None:
        newest = newest_good(run.checkpoints, warn=lambda text: emit(Warned(text=text)))
        if newest is None:
            raise NotFoundError(f"run {run.name} has no checkpoint yet", hint="start it again: sft train")
        return newest
    found = list_checkpoints(run.checkpoints)
    for checkpoint in found:
        if step_of(checkpoint) == step:
            verify(checkpoint)
            return checkpoint
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found) or "none"
    raise NotFoundError(f"run {run.name} has no checkpoint of step {step}", hint=f"it has: {steps}")


def pair_to_verify(run: RunFolder, step: int | None) -> tuple[Path, Path]:
    """Return the checkpoint of ``step``, or the newest but one, and the one that follows it.

    Raises:
        NotFoundError: There are no two such checkpoints.
    """
    found = list_checkpoints(run.checkpoints)
    for first, second in reversed(list(pairwise(found))):
        if step in (None, step_of(first)):
            return first, second
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found) or "none"
    raise NotFoundError(
        f"run {run.name} has no two checkpoints to replay between",
        hint=f"it has: {steps}; see checkpoint.keep_last",
    )


def count_equal(replayed: Snapshot, stored: Snapshot, *, name: str) -> int:
    """Return how many tensors of weights, optimizer and random state were compared.

    Raises:
        MismatchError: One of them differs in any bit.
    """
    count = 0
    rng = [
        {field: getattr(snapshot.rng, field) for field in ("python", "numpy", "torch")}
        for snapshot in (replayed, stored)
    ]
    pairs = ((replayed.weights, stored.weights), (replayed.optimizer, stored.optimizer), (rng[0], rng[1]))
    for ours, theirs in pairs:
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in ours or key not in theirs or not torch.equal(ours[key].cpu(), theirs[key]):
                raise MismatchError(
                    f"the replay does not end at {name}: {key} differs",
                    hint="the machine, its threads or the library versions are not those of the run",
                )
            count += 1
    return count


def clear_leftovers(run: RunFolder, emit: EventSink) -> None:
    """Remove what a killed process left half written. The caller holds the run's lock."""
    removed = storage.sweep(run.path, older_than_seconds=0)
    removed += storage.sweep(run.checkpoints, older_than_seconds=0)
    unfinished = [name for name in removed if name.startswith(f"{storage.TEMPORARY}step-")]
    if unfinished:
        emit(Notice(text=f"removed {', '.join(unfinished)}: left half written when a save was killed"))


def _set_aside_later(run: RunFolder, checkpoint: Path, emit: EventSink) -> None:
    """Take checkpoints after ``checkpoint`` out of the way; they are deleted once the first new one is safe."""
    for later in list_checkpoints(run.checkpoints):
        if step_of(later) > step_of(checkpoint):
            storage.disk.rename(later, later.with_name(f"{storage.TRASH}{later.name}"))
            emit(
                Notice(
                    text=f"checkpoint {later.name} is set aside: the run goes on from step {step_of(checkpoint)}"
                )
            )


def fingerprints(settings: Settings, located: LocatedModel, prepared: PreparedData) -> dict[str, str]:
    """Return what a run is made of, by name: every setting, and hashes of the data, the tokenizer and the model."""
    values = {f"{_SETTING}{key}": json.dumps(value) for key, value in _flat(settings).items()}
    return values | {
        "data": prepared.dataset.fingerprint,
        "data rows": f"{len(prepared.dataset.train)} + {len(prepared.dataset.heldout)} held out",
        "tokenizer and template": hashlib.sha256(str(prepared.tokenizer.fingerprint).encode()).hexdigest(),
        "model": _model_hash(located.folder),
    }


def compare(checkpoint: Path, now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the changes since ``checkpoint`` that are allowed, as name -> (then, now).

    Raises:
        MismatchError: Anything else differs; each difference is shown.
    """
    then = read_fingerprints(checkpoint)
    changed = {name: (then.get(name, "unset"), now[name]) for name in now if then.get(name) != now[name]}
    allowed = {name for name in changed if name.removeprefix(_SETTING) in CHANGEABLE}
    refused = {name: pair for name, pair in changed.items() if name not in allowed}
    if refused:
        shown = "; ".join(
            f"{name.removeprefix(_SETTING)} was {_short(a)}, is {_short(b)}"
            for name, (a, b) in refused.items()
        )
        raise MismatchError(
            f"{checkpoint} was made with something else: {shown}",
            hint=f"put it back as it was, or start a new run: sft train. May change: {', '.join(sorted(CHANGEABLE))}",
        )
    return {name.removeprefix(_SETTING): changed[name] for name in sorted(allowed)}


def record_resume(
    run: RunFolder, checkpoint: Path, changes: Mapping[str, tuple[str, str]], emit: EventSink
) -> None:
    """Write into ``run.json`` from where the run goes on and what changed, tell it, and put later checkpoints aside."""
    about = run.read_about()
    before = about.get("resumed")
    entry = {
        "at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "step": step_of(checkpoint),
        "changes": {key: list(pair) for key, pair in changes.items()},
    }
    write_json(run.about, about | {"resumed": [*(before if isinstance(before, list) else []), entry]})
    for key, (old, new) in changes.items():
        emit(Notice(text=f"{key} was {old}, is {new} from here on"))
    _set_aside_later(run, checkpoint, emit)


def check_space(run: RunFolder, parameters_bytes: int, settings: CheckpointSettings, emit: EventSink) -> None:
    """Make sure that the checkpoints that will exist at once fit on the run's disk.

    Args:
        run: Where they go.
        parameters_bytes: Size of the trainable parameters in float32.
        settings: How many are kept.
        emit: Told when room is scarce.

    Raises:
        StorageError: They do not fit.
    """
    one = 3 * parameters_bytes  # the weights and two moments
    have = len(list_checkpoints(run.checkpoints))
    most = 1 if settings.every_steps == 0 else settings.keep_last + 1
    need, free = one * max(1, most - have), shutil.disk_usage(run.path).free
    if free < need:
        raise StorageError(
            f"the disk of {run.path} has {gigabytes(free)} free; checkpoints of this model need {gigabytes(need)}",
            hint="free space, choose another --set run.root=DIR, or lower checkpoint.keep_last",
        )
    if free < 3 * one:
        emit(
            Warned(
                text=f"the disk of {run.path} has only {gigabytes(free)} free; a checkpoint takes {gigabytes(one)}"
            )
        )


def parameters_bytes(folder: Path) -> int:
    """Return the float32 size of the weights in a model folder, from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                count = 4
                for size in file.get_slice(name).get_shape():
                    count *= size
                total += count
    return total


def _flat(settings: Settings) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, values in settings.model_dump(mode="json").items()
        for name, value in values.items()
        if not f"{section}.".startswith(IGNORED_SECTIONS) and f"{section}.{name}" != _CONSENT
    }


def _model_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {storage.file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _short(value: str) -> str:
    is_hash = len(value) == 64 and all(digit in "0123456789abcdef" for digit in value)
    return f"sha256 {value[:12]}" if is_hash else value
