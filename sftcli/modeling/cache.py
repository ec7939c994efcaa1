"""The folder that keeps what was downloaded or converted once, and folders that appear whole or not at all."""

import errno
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from sftcli.errors import OutputError, SftError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HINT = "set SFT_CACHE_DIR to a folder that you can write to"
_STALE_SECONDS = 24 * 3600
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def cache_folder() -> Path:
    """Return the cache folder, made for this user alone where it is missing.

    ``SFT_CACHE_DIR``, else ``$XDG_CACHE_HOME/sft``, else ``~/.cache/sft``.

    Raises:
        OutputError: There is no home folder, or the folder cannot be made or written to.
    """
    root = _named_root()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the cache folder {root}: {error.strerror}", hint=_HINT) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise OutputError(f"the cache folder {root} is not writable", hint=_HINT)
    return root


def _named_root() -> Path:
    if chosen := os.environ.get("SFT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "sft"
    try:
        return Path.home() / ".cache" / "sft"
    except RuntimeError as error:
        raise OutputError("no home folder is known to keep models in", hint=_HINT) from error


@contextmanager
def scratch_folder(parent: Path, *, hint: str = _HINT) -> "Iterator[Path]":
    """Yield a new private folder in ``parent`` that is gone afterwards, whatever happens.

    Leftovers of processes that were killed more than a day ago are removed as well.

    Raises:
        StorageError: The disk ran full inside the block.
        OutputError: ``parent`` is not writable.
    """
    with storage_errors(parent, hint):
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(parent)
        scratch = Path(mkdtemp(prefix=".tmp-", dir=parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_folder(target: Path, *, hint: str = _HINT) -> "Iterator[Path]":
    """Yield a folder beside ``target`` to write in, and put it in the place of ``target`` when the block succeeds.

    Content is synced before it gets its name, so a crash leaves the old folder, no folder or the whole new one. When two
    processes make the same folder, the last one wins.
    """
    with scratch_folder(target.parent, hint=hint) as scratch:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        sync_tree(fresh)
        for attempt in range(5):
            if target.exists():
                target.rename(scratch / f"old-{attempt}")
            try:
                fresh.rename(target)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # otherwise another process was faster
                    raise
            else:
                break
        sync_folder(target.parent)


@contextmanager
def storage_errors(folder: Path, hint: str) -> "Iterator[None]":
    """Turn a failed write below ``folder`` into an error that says what to do."""
    try:
        yield
    except SftError:
        raise
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise StorageError(
                f"the disk that holds {folder} is full", hint=f"make room, or {hint}"
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} and _is_below(error.filename, folder):
            raise OutputError(f"cannot write to {folder}: {error.strerror}", hint=hint) from error
        raise


def _is_below(name: object, folder: Path) -> bool:
    return name is None or (isinstance(name, str) and Path(name).is_relative_to(folder))


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` survive a loss of power."""
    for place, _, files in os.walk(folder):
        for name in files:
            with Path(place, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a loss of power, where the system can sync folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(parent: Path) -> None:
    for leftover in parent.glob(".tmp-*"):
        try:
            old = time.time() - leftover.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(leftover, ignore_errors=True)
