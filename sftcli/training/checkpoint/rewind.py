"""Taking a run back to an earlier checkpoint without losing the later ones: they stay until a newer one is safe.

A file in the folder of the checkpoints says to which step the run was taken back, and which later checkpoints it had. It is
written first, so that what is renamed after it can be ended by whoever starts next, and it goes before anything is deleted.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sftcli import storage
from sftcli.errors import DataError, NotFoundError
from sftcli.own_files import OwnFile
from sftcli.paths import PathText
from sftcli.training.checkpoint.format import verify
from sftcli.training.checkpoint.names import (
    TAKEN_BACK,
    in_use,
    list_checkpoints,
    list_set_aside,
    set_aside,
    step_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBack:
    """A run was taken back to ``step``; ``aside`` are the names of the later checkpoints that it had."""

    step: int
    aside: tuple[PathText, ...]


_PLANS = OwnFile(
    form=TakenBack, hint="resume the run again from the checkpoint: sft resume RUN --checkpoint STEP"
)


def read_taken_back(root: Path) -> TakenBack | None:
    """Return the step to which the run with these checkpoints was rewound; None if it was not, or has a newer one since.

    Where the file that says so is damaged, what is set aside stays so, and no checkpoint counts as newer.
    """
    path = root / TAKEN_BACK
    if not path.is_file():
        return None
    unknown = TakenBack(step=sys.maxsize, aside=tuple(in_use(one).name for one in list_set_aside(root)))
    return _PLANS.find_whole(path) or unknown


def take_back(root: Path, step: int, *, was_finished: bool) -> TakenBack | None:
    """Make ``step`` the newest checkpoint: later ones are set aside, and earlier ones that were are brought back.

    Return what is to be finished by ``rename_all``, and then ``close``; None where there is nothing to do.
    """
    known = {in_use(path).name: path for path in [*list_checkpoints(root), *list_set_aside(root)]}
    later = tuple(sorted(name for name, path in known.items() if step_of(path) > step))
    if not (later or was_finished or list_set_aside(root)):
        return None
    plan = TakenBack(step=step, aside=later)
    _PLANS.write(root / TAKEN_BACK, plan)
    return plan


def rename_all(root: Path, plan: TakenBack) -> None:
    """Complete the renames of ``plan``; the latest goes first, so that at any moment no step is missing between others."""
    for path in list_set_aside(root):
        if in_use(path).name not in plan.aside and not in_use(path).exists():
            storage.disk.rename(path, in_use(path))
    for name in sorted(plan.aside, reverse=True):
        path = root / name
        if path.is_dir() and not set_aside(path).exists():
            storage.disk.rename(path, set_aside(path))
    storage.disk.sync(root)


def has_newer(root: Path, plan: TakenBack) -> bool:
    """Return whether a complete checkpoint was written since the run was rewound."""
    for path in reversed(list_checkpoints(root)):
        is_old = path.name in plan.aside and not set_aside(path).exists()
        if step_of(path) > plan.step and not is_old:
            with suppress(DataError, NotFoundError):
                verify(path)
                return True
    return False


def close(root: Path) -> None:
    """Delete what was set aside. The caller has verified a newer checkpoint, or there is nothing."""
    if (root / TAKEN_BACK).exists():
        storage.disk.unlink(root / TAKEN_BACK)
        storage.disk.sync(root)
    for path in list_set_aside(root):
        with suppress(OSError):  # what is left is taken by the next save
            storage.discard(path)
