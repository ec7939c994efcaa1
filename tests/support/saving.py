"""Checkpoints that several processes of a test write and compare together."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sftcli.config.schema.run import CheckpointSettings
from sftcli.training.checkpoint.format import MODEL
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.checkpoint.together import Leader, PartStore
from sftcli.training.distributed.group import Group
from sftcli.training.state import CheckpointStore, ForgetfulStore, TrainingSnapshot
from sftcli.training.trainer import Trainer


@dataclass(frozen=True)
class FolderNotes:
    """Notes in files of ``folder``, which is there and empty."""

    folder: Path

    def leave(self, name: str, text: str) -> None:
        fresh = self.folder / f"{name.replace('/', '-')}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.rename(fresh.with_suffix(".txt"))

    def find(self, name: str) -> str | None:
        path = self.folder / f"{name.replace('/', '-')}.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None


def store_of(trainer: Trainer, root: Path, notes: Path, **changes: object) -> CheckpointStore:
    """Return the store of a process of ``trainer``; ``notes`` is a folder that is empty where they begin."""
    group = trainer.group
    notes.mkdir(parents=True, exist_ok=True)
    if not group.is_writer:
        follows = trainer.weights.saves_parts
        notes_left = FolderNotes(notes)
        return (
            PartStore(root, notes_left, rank=group.rank, weights_name=MODEL) if follows else ForgetfulStore()
        )
    values: dict[str, object] = {
        "settings": CheckpointSettings(keep_last=99),
        "write_model_files": lambda folder: None,
        "fingerprints": {},
        "pause": lambda seconds: None,
        "others": Leader(FolderNotes(notes), processes=group.size) if trainer.weights.saves_parts else None,
    }
    return DirectoryCheckpointStore(root, **(values | changes))


def assert_has_parts_of(
    found: TrainingSnapshot, whole: TrainingSnapshot, group: Group, *, within: float
) -> None:
    """Assert that the processes of ``group`` have in ``found`` each tensor of ``whole`` once, and its numbers."""
    for part in ("weights", "optimizer"):
        ours, theirs = getattr(found, part), getattr(whole, part)
        assert group.sum([float(name in ours) for name in sorted(theirs)]) == [1.0] * len(theirs)
        assert ours.keys() <= theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=within)
