"""Checkpoints on disk: complete or absent, and never deleted before a newer one is verified.

A checkpoint is staged beside its final name, each file is written and synced, the manifest with sizes and hashes comes
last, and one rename makes it real. It opens as a Hugging Face model folder as well: ``model.safetensors`` holds the
float32 masters and the buffers, and the model's config and tokenizer lie beside them. Where an adapter is trained, it
opens as a folder of peft, and holds no weight of the model below. Of weights that are shared out each process writes a part
of the tensors (see ``together``), and the folder has several files of weights with an index, as those of large models have.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.errors import StorageError, UnsavedError
from sftcli.figures import size
from sftcli.own_files import Stamp
from sftcli.training.checkpoint.format import (
    MODEL,
    read_best_step,
    read_snapshot,
    snapshot_bytes,
    verify,
    write_part,
    write_rest,
)
from sftcli.training.checkpoint.names import PREFIX, list_checkpoints, step_of
from sftcli.training.checkpoint.rewind import close
from sftcli.training.checkpoint.together import Leader
from sftcli.training.state import Part, TrainingSnapshot

ATTEMPTS = 3
PAUSE_SECONDS = 0.5  # before the second attempt; doubles
# What earlier versions left here: halves of killed saves, and checkpoints on their way out or set aside.
_FORMER_LEFTOVER = re.compile(r"\.(?:tmp-step-\d{8}-|trash-step-\d{8}-)[0-9a-f]{8}")
_FORMER_ASIDE = re.compile(r"\.trash-step-\d{8}")


class DirectoryCheckpointStore:
    """Keeps checkpoints as ``step-00000100`` folders under ``root``.

    Args:
        root: Folder of the checkpoints; made when the first one is saved.
        settings: Which checkpoints are kept.
        write_model_files: Writes the model's config and tokenizer into the folder it is given.
        fingerprints: What the run was made of (data, settings), by name; stored, and compared by who resumes.
        resume_command: Named where the user has to act.
        check_owner: Raises when this run was taken over; asked before a checkpoint is published.
        pause: Waits that many seconds.
        weights_name: File of the weights: ``MODEL`` or ``ADAPTER``.
        write_beside: Writes what belongs beside a checkpoint, once that is durable.
        others: The other processes, where each writes a part.
    """

    def __init__(
        self,
        root: Path,
        *,
        settings: CheckpointSettings,
        write_model_files: Callable[[Path], None],
        fingerprints: Mapping[str, str],
        resume_command: str = "sft resume",
        check_owner: Callable[[], None] = lambda: None,
        pause: Callable[[float], None] = time.sleep,
        weights_name: str = MODEL,
        write_beside: Callable[[TrainingSnapshot], None] | None = None,
        others: Leader | None = None,
    ) -> None:
        self.root = root
        self.settings = settings
        self.write_model_files = write_model_files
        self.fingerprints = dict(fingerprints)
        self.resume_command = resume_command
        self.check_owner = check_owner
        self.pause = pause
        self.weights_name = weights_name
        self.write_beside = write_beside
        self.others = others

    def save(self, snapshot: TrainingSnapshot) -> str:
        """Write ``snapshot``, verify it, then delete what the settings do not keep.

        A fault that may pass, as of a network drive, is tried again into a new folder.

        Raises:
            StorageError: The disk is full; earlier checkpoints are intact.
            UnsavedError: Writing failed for another reason, ``ATTEMPTS`` times if that could help.
        """
        if self.others is None:
            return self._save(snapshot)
        try:
            path = self._save(snapshot)
        except Exception as error:
            self.others.end_with(error)
            raise
        self.others.end(path)
        return path

    def _save(self, snapshot: TrainingSnapshot) -> str:
        attempt = 1
        while (final := self._try_save(snapshot, is_last=attempt == ATTEMPTS)) is None:
            self.pause(PAUSE_SECONDS * 2 ** (attempt - 1))
            attempt += 1
        self._prune(final, snapshot.part)
        if self.write_beside is not None:
            self.write_beside(snapshot if snapshot.part.of == 1 else read_snapshot(final, is_verified=True))
        return str(final)

    def _try_save(self, snapshot: TrainingSnapshot, *, is_last: bool) -> Path | None:
        """Return the new checkpoint, or None when trying again may help."""
        try:
            return self._save_once(snapshot)
        except OSError as error:
            if error.errno in storage.FULL_DISK:
                raise self._full(snapshot) from error
            if is_last or error.errno not in storage.PASSING:
                raise self._unsaved(snapshot, error) from error
            return None

    def _save_once(self, snapshot: TrainingSnapshot) -> Path:
        name = f"{PREFIX}{snapshot.state.step:08d}"
        final = self.root / name
        staging = storage.scratch_path(self.root, storage.TEMPORARY, name)
        try:
            if not self.root.is_dir():
                self.check_owner()  # a run's folder that somebody has removed is not made again
                storage.make_folders(self.root)
            storage.disk.make_folder(staging)
            self.write_model_files(staging)
            files = self._write_tensors(staging, snapshot)
            write_rest(staging, snapshot, files, fingerprints=self.fingerprints)
            self.check_owner()
            if final.exists():  # what a damaged or abandoned run left under this name
                storage.disk.rename(final, storage.scratch_path(self.root, storage.TRASH, name))
            storage.disk.rename(staging, final)
            storage.disk.sync(self.root)
        except (OSError, StorageError):
            storage.try_remove_tree(staging)
            raise
        return final

    def _write_tensors(self, staging: Path, snapshot: TrainingSnapshot) -> Mapping[str, Stamp]:
        if self.others is None:
            return write_part(staging, snapshot, weights_name=self.weights_name)
        self.others.ask_for_parts(staging)
        try:
            own = write_part(staging, snapshot, weights_name=self.weights_name)
        finally:
            parts = self.others.parts()  # after which nobody writes there any more
        return own | parts

    def _prune(self, newest: Path, own: Part) -> None:
        """Delete what the settings do not keep, once ``newest`` reads back as it was written: here the files of the part ``own``."""
        verify(newest, part=own)
        found = list_checkpoints(self.root)
        kept = set(found[-self.settings.keep_last :]) | {newest}
        if every := self.settings.keep_every_steps:
            kept |= {checkpoint for checkpoint in found if step_of(checkpoint) % every == 0}
        if self.settings.keep_best:
            kept |= set(
                [checkpoint for checkpoint in found if read_best_step(checkpoint) == step_of(checkpoint)][-1:]
            )
        for old in found:
            if old not in kept:
                with suppress(
                    OSError
                ):  # an old checkpoint too many does no harm, and the next save tries again
                    storage.discard(old)
        close(self.root)
        for path in self.root.iterdir():
            if is_trash(path.name):
                storage.try_remove_tree(path)

    def _full(self, snapshot: TrainingSnapshot) -> StorageError:
        need, free = snapshot_bytes(snapshot), shutil.disk_usage(storage.nearest_folder(self.root)).free
        return StorageError(
            f"disk full while saving step {snapshot.state.step} to {self.root}: "
            f"need {size(need)}, free {size(free)}. {self._intact()}",
            hint=f"free space, then run: {self.resume_command}",
        )

    def _unsaved(self, snapshot: TrainingSnapshot, error: OSError) -> UnsavedError:
        return UnsavedError(
            f"could not save the checkpoint of step {snapshot.state.step} to {self.root}: "
            f"{error.strerror or error}. {self._intact()}",
            hint=f"check the drive, then run: {self.resume_command}",
        )

    def _intact(self) -> str:
        found = list_checkpoints(self.root)
        return f"Step {step_of(found[-1])} is intact" if found else "No earlier checkpoint exists"


def is_trash(name: str) -> bool:
    """Return whether something in a folder of checkpoints is one on its way out."""
    is_former = _FORMER_LEFTOVER.fullmatch(name) and name.startswith(".trash")
    return bool(
        storage.scratch_label(name, storage.TRASH) is not None or is_former or _FORMER_ASIDE.fullmatch(name)
    )


def clear_halves(root: Path) -> list[str]:
    """Remove what killed saves left in a folder of checkpoints; return which checkpoints were only half written.

    One that was on its way out because a newer one of the same step was to take its place is put back where that one never came.
    """
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    for name in names:
        label = storage.scratch_label(name, storage.TRASH)
        if label and label.startswith(PREFIX) and not (root / label).exists():
            storage.disk.rename(root / name, root / label)
    former = [name for name in names if _FORMER_LEFTOVER.fullmatch(name)]
    for name in former:
        storage.try_remove_tree(root / name)
    labels = [storage.scratch_label(name, storage.TEMPORARY) for name in storage.sweep(root, is_locked=True)]
    halves = [name[len(".tmp-") : -len("-12345678")] for name in former if name.startswith(".tmp-")]
    return sorted(halves + [label for label in labels if label])
