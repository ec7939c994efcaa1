"""The cache folder for downloaded and converted models, and atomic creation of folders in it."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli import storage
from sftcli.errors import ConsentError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HINT = "set SFT_CACHE_DIR to a folder that you can write to"


def cache_folder() -> Path:
    """Return the cache folder, created for this user alone if missing.

    ``SFT_CACHE_DIR``, else ``$XDG_CACHE_HOME/sft``, else ``~/.cache/sft``.

    Raises:
        OutputError: There is no home folder, or the folder cannot be made or written to.
        ConsentError: It belongs to another user, who could put a model of theirs there; naming it allows that.
    """
    root = _named_root()
    try:
        storage.make_folders(root, mode=0o700)
    except OSError as error:
        raise OutputError(f"cannot make the cache folder {root}: {error.strerror}", hint=_HINT) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise OutputError(f"the cache folder {root} is not writable", hint=_HINT)
    if not os.environ.get("SFT_CACHE_DIR") and root.stat().st_uid not in (os.getuid(), 0):
        raise ConsentError(
            f"the cache folder {root} belongs to another user, who controls its contents",
            hint=f"trust it with SFT_CACHE_DIR={root}, or set SFT_CACHE_DIR to a folder of your own",
        )
    return root


def _named_root() -> Path:
    if chosen := os.environ.get("SFT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "sft"
    try:
        return Path.home() / ".cache" / "sft"
    except RuntimeError as error:
        raise OutputError("there is no home folder to cache models in", hint=_HINT) from error


@contextmanager
def scratch_folder(parent: Path, *, hint: str = _HINT) -> "Iterator[Path]":
    """Yield a private folder in the cache folder ``parent``; see ``storage.scratch_folder``."""
    with storage.scratch_folder(parent, hint=hint) as scratch:
        yield scratch


@contextmanager
def atomic_folder(target: Path, *, hint: str = _HINT) -> "Iterator[Path]":
    """Create the folder ``target`` in the cache atomically; see ``storage.atomic_folder``."""
    with storage.atomic_folder(target, hint=hint) as fresh:
        yield fresh
