"""Checkpoints on disk: whole or absent.

A checkpoint is staged beside its final name, each file is flushed to the disk, the manifest with sizes and hashes is written
last, and one rename makes it real. It opens as a Hugging Face model folder as well: ``model.safetensors`` holds the
float32 masters, and the model's config and tokenizer lie beside them.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sftcli.errors import DataError, NotFoundError, StorageError
from sftcli.runtime import RngState
from sftcli.training.trainer import Snapshot, TrainState

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "step-"


class DirectoryCheckpointStore:
    """Keeps checkpoints as ``step-00000100`` folders under ``root``.

    Args:
        root: Folder of the checkpoints; made when the first one is saved.
        keep_last: How many are kept; older ones go once the newest is verified.
        write_model_files: Writes the model's config and tokenizer into the folder it is given.
        fingerprints: What the run was made of (data, settings), by name; stored, and compared by who resumes.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int,
        write_model_files: Callable[[Path], None],
        fingerprints: Mapping[str, str],
    ) -> None:
        self.root = root
        self.keep_last = keep_last
        self.write_model_files = write_model_files
        self.fingerprints = dict(fingerprints)

    def save(self, snapshot: Snapshot) -> str:
        """Write ``snapshot``, verify it, then delete what is older than the last ``keep_last``.

        Raises:
            StorageError: The disk is full or writing failed; earlier checkpoints are intact.
        """
        name = f"{PREFIX}{snapshot.state.step:08d}"
        final = self.root / name
        staging = self.root / f".tmp-{name}-{secrets.token_hex(4)}"
        try:
            staging.mkdir(parents=True)
            self._write(staging, snapshot)
            if final.exists():  # a resumed run that saves the step it started from
                shutil.rmtree(final)
            staging.rename(final)
            _sync_folder(self.root)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise StorageError(
                f"could not save the checkpoint of step {snapshot.state.step} to {final}: {error.strerror or error}",
                hint="free space or choose another run.root, then run: sft resume",
            ) from error
        verify(final)
        for old in list_checkpoints(self.root)[: -self.keep_last]:
            shutil.rmtree(old)
        return str(final)

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        self.write_model_files(folder)
        _save_tensors(snapshot.weights, folder / "model.safetensors")
        _save_tensors(snapshot.optimizer, folder / "optimizer.safetensors")
        rng = {field: getattr(snapshot.rng, field) for field in ("python", "numpy", "torch", "device")}
        _save_tensors(rng, folder / "rng.safetensors")
        state = {"format": FORMAT_VERSION, "state": asdict(snapshot.state), "fingerprints": self.fingerprints}
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        files = {}
        for path in sorted(folder.iterdir()):
            _sync_file(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = folder / MANIFEST
        manifest.write_text(
            json.dumps({"format": FORMAT_VERSION, "files": files}, indent=2), encoding="utf-8"
        )
        _sync_file(manifest)
        _sync_folder(folder)


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints under ``root``, lowest step first; unfinished ones are left out."""
    if not root.is_dir():
        return []
    found = [
        path
        for path in root.iterdir()
        if re.fullmatch(PREFIX + r"\d+", path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(folder.name.removeprefix(PREFIX))


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DataError: A file is missing, has another size, or another hash.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, wanted in manifest["files"].items():
        path = folder / Path(name).name  # a manifest is input: no name may lead out of the folder
        if not path.is_file():
            raise DataError(f"checkpoint {folder} lacks {name}")
        if path.stat().st_size != wanted["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes, its manifest says {wanted['bytes']}")
        if _sha256(path) != wanted["sha256"]:
            raise DataError(f"{path} was changed after it was saved: its sha256 is not the manifest's")


def read_snapshot(folder: Path) -> Snapshot:
    """Read a checkpoint back, on the CPU.

    Raises:
        NotFoundError: ``folder`` is no complete checkpoint.
        DataError: Its content does not verify.
    """
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    verify(folder)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Snapshot(
        state=TrainState(**state["state"]),
        weights=load_file(folder / "model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        rng=RngState(**load_file(folder / "rng.safetensors")),
    )


def read_fingerprints(folder: Path) -> dict[str, str]:
    """Return the fingerprints stored in a checkpoint."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return dict(state["fingerprints"])


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # transformers opens a safetensors file only when its metadata names the framework.
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
