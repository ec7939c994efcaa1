"""Which folders are checkpoints, told from their names: no torch is needed to list them."""

import re
from pathlib import Path

PREFIX = "step-"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints under ``root``, lowest step first; unfinished ones are left out.

    The order is that of the steps in the names: times are reset by copies, and clocks jump.
    """
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(PREFIX + r"\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(folder.name.removeprefix(PREFIX))
