"""What is inside a checkpoint folder, written and read: nothing else knows its files.

It holds safetensors files of the weights, of the optimizer's state and of the random states; the counters of the run as JSON;
the files that make it a model folder or an adapter's; and a manifest, which comes last, with the size and hash of each. Weights
and optimizer may be in several files each, of which every process of a training has written one (see ``layout``).
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sftcli import storage
from sftcli.errors import DataError, NotFoundError, StorageError
from sftcli.json_files import json_text
from sftcli.modeling.formats.folder_check import INDEX, check_safetensors
from sftcli.modeling.formats.stored_tensors import index_of, tensor_file_parts, tensors_of_file
from sftcli.modeling.formats.written import check_file_written
from sftcli.own_files import OwnFile, Stamp, stamp_of
from sftcli.training.checkpoint.layout import are_all_parts, number_of, part_name, part_names
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.state import Part, RngState, TrainingSnapshot, TrainState

MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
ADAPTER = "adapter_model.safetensors"  # in place of MODEL where an adapter is trained
_OTHER_DISK = "check the disk, and run it again"
_OLDER = "delete this checkpoint, and the run resumes from the one before it"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """Counters of a run, and what it was made of: hashes and settings by name."""

    state: TrainState
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of a checkpoint by name, in how many parts its tensors are, and the hash of all that the manifest says."""

    step: int
    parts: int = 1
    files: Mapping[str, Stamp]
    sha256: str


STATES = OwnFile(form=StoredState, hint=_OLDER)
MANIFESTS = OwnFile(form=Manifest, version=2, hint=_OLDER)  # 2 has parts; without any 1 is written


def write_part(folder: Path, snapshot: TrainingSnapshot, *, weights_name: str) -> dict[str, Stamp]:
    """Write the tensors of ``snapshot``, or those of its part, into ``folder``; return size and hash of each file, which are synced.

    Raises:
        StorageError: The weights do not read back as they are; of a part, any byte does not.
    """
    part, files = snapshot.part, {}
    for whole, tensors in ((weights_name, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
        name = part_name(whole, part)
        files[name] = _written(folder / name, tensor_file_parts(tensors))
    check_file_written(folder / part_name(weights_name, part), snapshot.weights)
    for name, stamp in (
        files.items() if part.of > 1 else ()
    ):  # which the process that verifies the whole leaves out
        if stamp_of(folder / name) != stamp:
            raise StorageError(f"{folder / name} does not read back as it was written", hint=_OTHER_DISK)
    return files


def write_rest(
    folder: Path,
    snapshot: TrainingSnapshot,
    tensors: Mapping[str, Stamp],
    *,
    fingerprints: Mapping[str, str],
) -> None:
    """Make a checkpoint of ``folder``, which holds the files of its model and those of its ``tensors``. Each file is synced."""
    parts = snapshot.part.of
    beside = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in tensors)
    files = {**{path.name: stamp_of(path) for path in beside}, **tensors}
    if parts > 1:
        files[INDEX] = _written(folder / INDEX, [_index(folder, parts)])
    files[RNG] = _written(folder / RNG, tensor_file_parts(rng_tensors(snapshot)))
    stored = StoredState(state=snapshot.state, fingerprints=dict(fingerprints))
    files[STATE] = _written(folder / STATE, [STATES.text(stored).encode()])
    storage.disk.sync(folder)
    plain = {name: asdict(stamp) for name, stamp in files.items()}
    storage.write_file(folder / MANIFEST, [manifest_bytes(snapshot.state.step, plain, parts=parts)])
    storage.disk.sync(folder)


def _written(path: Path, parts: Iterable[bytes | memoryview]) -> Stamp:
    found = storage.write_file(path, parts)
    return Stamp(bytes=int(found["bytes"]), sha256=str(found["sha256"]))


def _index(folder: Path, parts: int) -> bytes:
    """Return the list of weights that transformers and others open several files by."""
    places = {
        name: (file, tensor.end - tensor.begin)
        for file in part_names(MODEL, parts)
        for name, tensor in tensors_of_file(folder / file).items()
    }
    files = {name: file for name, (file, _) in places.items()}
    return json_text(index_of(files, sum(size for _, size in places.values()))).encode()


def read_snapshot(folder: Path, *, is_verified: bool = False, part: Part | None = None) -> TrainingSnapshot:
    """Read a checkpoint back, whole. It is verified first, unless this process has done so.

    Its tensors are on the CPU, and are read from the disk when their numbers are asked for: whoever copies some rows of each has
    these in memory, and no more. ``part`` is as in ``verify``.

    Raises:
        NotFoundError: ``folder`` is no complete checkpoint.
        DataError: Its content does not verify.
    """
    if not is_verified:
        verify(folder, part=part)
    manifest = _read_manifest(folder)
    weights = ADAPTER if ADAPTER in manifest.files else MODEL
    state = _read_state(folder)
    try:
        rng, *peers = _rng_states(_tensors(folder, [RNG]))
        return TrainingSnapshot(
            state=state.state,
            weights=_tensors(folder, part_names(weights, manifest.parts)),
            optimizer=_tensors(folder, part_names(OPTIMIZER, manifest.parts)),
            rng=rng,
            peers=tuple(peers),
        )
    except (TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} was written in another format: {error}") from error


def _tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of all files together.

    Raises:
        NotFoundError, DataError: A file is missing or damaged, or two have a tensor of the same name.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        check_safetensors(folder / name)
        tensors = load_file(folder / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise DataError(f"{folder / name} holds {twice[0]}, which another part holds")
        found |= tensors
    return found


def verify(folder: Path, *, part: Part | None = None) -> None:
    """Compare every file of a checkpoint with its manifest.

    With ``part`` this is one of several processes that verify it together: each takes some of the parts of the checkpoint, and of
    all other files the size.

    Raises:
        NotFoundError: A file is missing.
        DataError: A file has another size or another hash, or the manifest cannot be read.
    """
    _compare(folder, read_manifest(folder), part or Part())


def _compare(folder: Path, files: Mapping[str, Stamp], own: Part) -> None:
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise NotFoundError(f"checkpoint {folder} lacks {name}")
        size = path.stat().st_size
        if size != wanted.bytes:
            raise DataError(f"{path} has {size} bytes, its manifest says {wanted.bytes}")
        if number_of(name) % own.of == own.number and storage.file_sha256(path) != wanted.sha256:
            raise DataError(f"{path} was changed after it was saved: its sha256 does not match the manifest")


def verify_model(folder: Path) -> None:
    """Compare the weights of a checkpoint in several parts with its manifest; ``folder`` may be anything else.

    Parts of other steps and runs have the same names, tensors and sizes: together they are a model that nobody has trained.

    Raises:
        NotFoundError, DataError: As ``verify``.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = _read_manifest(folder)
    if manifest.parts > 1:
        wanted = {INDEX, *part_names(MODEL, manifest.parts)}
        _compare(folder, {name: stamp for name, stamp in manifest.files.items() if name in wanted}, Part())


def newest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint under ``root`` that verifies; ``warn`` receives what is wrong with newer ones.

    Raises:
        DataError: There are checkpoints and none of them verifies.
    """
    found = list_checkpoints(root)
    faults = []
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
        except (DataError, NotFoundError) as error:
            faults.append(error.message)
            continue
        for fault in faults:
            warn(f"{fault}; resuming from step {step_of(checkpoint)} instead")
        return checkpoint
    if not found:
        return None
    raise DataError(
        f"no checkpoint under {root} is intact: {'; '.join(faults)}",
        hint=f"to start the run over from its recorded settings: mv {shlex.quote(str(root))} {shlex.quote(f'{root}-damaged')}; "
        f"sft resume {shlex.quote(str(root.parent))}",
    )


def manifest_bytes(step: int, files: Mapping[str, Mapping[str, object]], *, parts: int = 1) -> bytes:
    """Return a manifest with its own hash, to distinguish damage to it from damage to the listed files."""
    layout = {"format": 1} if parts == 1 else {"format": MANIFESTS.version, "parts": parts}
    content: dict[str, object] = {**layout, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2).encode()


def read_manifest(folder: Path) -> Mapping[str, Stamp]:
    """Return size and hash of each file of a checkpoint, by name.

    Raises:
        NotFoundError: ``folder`` is no complete checkpoint.
        DataError: The manifest is damaged, or names a file outside of the folder.
    """
    return _read_manifest(folder).files


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    manifest = MANIFESTS.read(path)
    files = manifest.files
    plain = {name: asdict(one) for name, one in files.items()}
    is_own = path.read_bytes() == manifest_bytes(manifest.step, plain, parts=manifest.parts)
    if not (is_own and _has_all(files, manifest.parts)):
        raise DataError(f"{path} was changed after it was saved, or does not list all files of a checkpoint")
    for name in files:
        if name != Path(name).name or name in {"", ".", ".."}:  # a manifest is input
            raise DataError(f"{path} names {name!r}, which is outside of the checkpoint")
    return manifest


def _has_all(files: Mapping[str, Stamp], parts: int) -> bool:
    """Return whether ``files`` are all of a checkpoint whose tensors are in so many parts."""
    if parts == 1:
        return {OPTIMIZER, RNG, STATE} <= files.keys() and len({MODEL, ADAPTER} & files.keys()) == 1
    is_adapter = ADAPTER in files
    return (
        {INDEX, RNG, STATE} <= files.keys()
        and not is_adapter
        and are_all_parts(files, MODEL, OPTIMIZER, parts=parts)
    )


def snapshot_bytes(snapshot: TrainingSnapshot) -> int:
    """Return about how much disk a checkpoint of ``snapshot`` takes; its parts are taken to be alike."""
    tensors = (*snapshot.weights.values(), *snapshot.optimizer.values())
    return snapshot.part.of * sum(tensor.numel() * tensor.element_size() + 128 for tensor in tensors)


def rng_tensors(snapshot: TrainingSnapshot) -> dict[str, Tensor]:
    """Return the random states as stored in a file: those of rank 0 by name, of others as ``name.rank``."""
    return {
        f"{field.name}.{rank}" if rank else field.name: getattr(state, field.name)
        for rank, state in enumerate((snapshot.rng, *snapshot.peers))
        for field in fields(state)
    }


def _rng_states(tensors: Mapping[str, Tensor]) -> list[RngState]:
    """Return the random states of all processes by rank.

    Raises:
        TypeError: One is not whole.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rank = key.partition(".")
        states.setdefault(int(rank or 0), {})[name] = tensor
    return [RngState(**states[rank]) for rank in sorted(states)]


def read_fingerprints(folder: Path) -> dict[str, str]:
    """Return the fingerprints stored in a checkpoint."""
    return dict(_read_state(folder).fingerprints)


def read_best_step(folder: Path) -> int:
    """Return the step of the lowest held-out loss up to a checkpoint; 0 if unknown."""
    try:
        return _read_state(folder).state.best_step
    except DataError:
        return 0


def read_stale_evals(folder: Path) -> int:
    """Return how many evaluations up to a checkpoint were in a row without a lower held-out loss."""
    return _read_state(folder).state.stale_evals


def owes_heldout(folder: Path) -> bool:
    """Return whether a checkpoint lacks the held-out loss of its step: not due, or the run was stopped before it."""
    state = _read_state(folder).state
    return state.last_heldout_step != state.step


def _read_state(folder: Path) -> StoredState:
    try:
        return STATES.read(folder / STATE)
    except NotFoundError as error:
        raise DataError(error.message, hint=error.hint) from error
