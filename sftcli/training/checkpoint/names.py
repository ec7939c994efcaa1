"""Which folders are checkpoints, by name alone, so that listing them needs no torch."""

import re
from pathlib import Path

PREFIX = "step-"
ASIDE = ".aside-"  # before the name of a checkpoint that a run was taken back from; see ``taking_back``
TAKEN_BACK = ".taken-back.json"  # there while such checkpoints are


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints under ``root``, lowest step first; unfinished ones are left out.

    The order is that of the steps in the names: times are reset by copies, and clocks jump.
    """
    return _named(root, PREFIX)


def list_set_aside(root: Path) -> list[Path]:
    """Return the checkpoints under ``root`` that the run was taken back from, lowest step first."""
    return _named(root, ASIDE + PREFIX)


def _named(root: Path, prefix: str) -> list[Path]:
    if not root.is_dir():
        return []
    pattern = re.escape(prefix) + r"\d+"
    return sorted(
        (path for path in root.iterdir() if re.fullmatch(pattern, path.name) and path.is_dir()), key=step_of
    )


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint, set aside or not."""
    return int(folder.name.removeprefix(ASIDE).removeprefix(PREFIX))


def in_use(folder: Path) -> Path:
    """Return the path that a checkpoint has while it is not set aside."""
    return folder.with_name(folder.name.removeprefix(ASIDE))


def set_aside(folder: Path) -> Path:
    """Return the path that the checkpoint ``folder`` has while it is set aside."""
    return folder.with_name(ASIDE + folder.name)
