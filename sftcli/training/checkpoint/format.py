"""What is inside a checkpoint folder, written and read: nothing else knows its files.

It holds safetensors files of the weights, of the optimizer's state and of the random states; the counters of the run as JSON;
the files that make it a model folder or an adapter's; and a manifest, which comes last, with the size and hash of each.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sftcli import storage
from sftcli.errors import DataError, NotFoundError
from sftcli.modeling.formats.folder_check import check_safetensors
from sftcli.modeling.formats.stored_tensors import file_header
from sftcli.modeling.formats.written import check_file_written
from sftcli.own_files import OwnFile, Stamp, stamp_of
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.state import RngState, TrainingSnapshot, TrainState

MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
ADAPTER = "adapter_model.safetensors"  # in place of MODEL where an adapter is trained
_OLDER = "delete this checkpoint, and the run resumes from the one before it"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """Counters of a run, and what it was made of: hashes and settings by name."""

    state: TrainState
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of a checkpoint by name, and the hash of all that the manifest says."""

    step: int
    files: Mapping[str, Stamp]
    sha256: str


STATES = OwnFile(form=StoredState, hint=_OLDER)
MANIFESTS = OwnFile(form=Manifest, hint=_OLDER)
_TYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip


def write_snapshot(
    folder: Path, snapshot: TrainingSnapshot, *, weights_name: str, fingerprints: Mapping[str, str]
) -> None:
    """Make a checkpoint of ``folder``, which holds the files of its model but no weights. Each file is synced.

    Raises:
        StorageError: The weights do not read back as they are.
    """
    files: dict[str, Mapping[str, object]] = {
        path.name: asdict(stamp_of(path)) for path in sorted(folder.iterdir()) if path.is_file()
    }
    for name, tensors in (
        (weights_name, snapshot.weights),
        (OPTIMIZER, snapshot.optimizer),
        (RNG, rng_tensors(snapshot)),
    ):
        files[name] = storage.write_file(folder / name, tensor_file_parts(tensors))
    check_file_written(folder / weights_name, snapshot.weights)
    stored = StoredState(state=snapshot.state, fingerprints=dict(fingerprints))
    files[STATE] = storage.write_file(folder / STATE, [STATES.text(stored).encode()])
    storage.disk.sync(folder)
    storage.write_file(folder / MANIFEST, [manifest_bytes(snapshot.state.step, files)])
    storage.disk.sync(folder)


def read_snapshot(folder: Path, *, is_verified: bool = False) -> TrainingSnapshot:
    """Read a checkpoint back, on the CPU. It is verified first, unless this process has done so.

    Raises:
        NotFoundError: ``folder`` is no complete checkpoint.
        DataError: Its content does not verify.
    """
    if not is_verified:
        verify(folder)
    weights = MODEL if (folder / MODEL).is_file() else ADAPTER
    for name in (weights, OPTIMIZER, RNG):
        check_safetensors(folder / name)
    state = _read_state(folder)
    try:
        rng, *peers = _rng_states(load_file(folder / RNG))
        return TrainingSnapshot(
            state=state.state,
            weights=load_file(folder / weights),
            optimizer=load_file(folder / OPTIMIZER),
            rng=rng,
            peers=tuple(peers),
        )
    except (TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} was written in another format: {error}") from error


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        NotFoundError: A file is missing.
        DataError: A file has another size or another hash, or the manifest cannot be read.
    """
    for name, wanted in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise NotFoundError(f"checkpoint {folder} lacks {name}")
        size = path.stat().st_size
        if size != wanted.bytes:
            raise DataError(f"{path} has {size} bytes, its manifest says {wanted.bytes}")
        if storage.file_sha256(path) != wanted.sha256:
            raise DataError(f"{path} was changed after it was saved: its sha256 does not match the manifest")


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


def manifest_bytes(step: int, files: Mapping[str, Mapping[str, object]]) -> bytes:
    """Return a manifest with its own hash, to distinguish damage to it from damage to the listed files."""
    content: dict[str, object] = {"format": MANIFESTS.version, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2).encode()


def read_manifest(folder: Path) -> Mapping[str, Stamp]:
    """Return size and hash of each file of a checkpoint, by name.

    Raises:
        NotFoundError: ``folder`` is no complete checkpoint.
        DataError: The manifest is damaged, or names a file outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    manifest = MANIFESTS.read(path)
    files = manifest.files
    whole = (
        path.read_bytes() == manifest_bytes(manifest.step, {name: asdict(one) for name, one in files.items()})
        and {OPTIMIZER, RNG, STATE} <= set(files)
        and len({MODEL, ADAPTER} & set(files)) == 1
    )
    if not whole:
        raise DataError(f"{path} was changed after it was saved, or does not list all files of a checkpoint")
    for name in files:
        if name != Path(name).name or name in {"", ".", ".."}:  # a manifest is input
            raise DataError(f"{path} names {name!r}, which is outside of the checkpoint")
    return files


def tensor_file_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file that holds ``tensors``; each is read when its turn comes."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    yield file_header(
        {name: (_TYPES[one.dtype], one.shape, one.numel() * one.element_size()) for name, one in order}
    )
    for _, tensor in order:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def snapshot_bytes(snapshot: TrainingSnapshot) -> int:
    """Return about how much disk a checkpoint of ``snapshot`` takes."""
    tensors = (*snapshot.weights.values(), *snapshot.optimizer.values())
    return sum(tensor.numel() * tensor.element_size() + 128 for tensor in tensors)


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
