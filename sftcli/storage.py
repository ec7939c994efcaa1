"""Everything that changes a disk: files and folders that are whole or absent, and the few operations they are made of.

All writers of this program go through ``disk``, so a test can stop the machine, or fail it, at each operation.
"""

import errno
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sftcli.errors import OutputError, SftError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import IO

    from _typeshed import ReadableBuffer


_FOREIGN_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust tells errors of the system


class Disk:
    """The operations that change a disk, each one a moment at which a machine can stop."""

    def make_folder(self, path: Path, *, mode: int = 0o777) -> None:
        """Make ``path``; its parent exists."""
        path.mkdir(mode=mode)

    def create(self, path: Path) -> BinaryIO:
        """Open ``path`` for writing, empty, unbuffered."""
        return path.open("wb", buffering=0)

    def create_alone(self, path: Path, *, mode: int = 0o666) -> BinaryIO:
        """Open ``path`` like ``create``; where it exists already, also as a link, ``FileExistsError`` is raised."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(path, flags, mode), "wb", buffering=0)

    def append(self, path: Path) -> BinaryIO:
        """Open ``path`` for writing at its end, unbuffered."""
        return path.open("ab", buffering=0)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Write all of ``data``."""
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def truncate(self, path: Path, size: int) -> None:
        """Cut ``path`` to its first ``size`` bytes."""
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Make the content of a file, or the names in a folder, survive a loss of power."""
        if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
            return  # a system that cannot sync folders
        try:
            handle = os.open(
                path, os.O_RDWR if os.name == "nt" else os.O_RDONLY
            )  # Windows syncs what may be written
        except PermissionError:
            if path.is_dir():
                return  # a folder that may be written to and not read cannot be opened
            raise
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``; a file of that name is replaced in the same moment.

        Raises:
            OSError: It cannot be done; or ``target`` is no file: a machine whose ``/dev/null`` is one does not work any more.
        """
        if what := _what_no_file(target):
            raise OSError(errno.EINVAL, f"it is {what} and no file", str(target))
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def link(self, path: Path, target: Path) -> None:
        """Make ``path`` a symbolic link to ``target``."""
        path.symlink_to(target)

    def touch(self, path: Path) -> None:
        """Give ``path`` the present time."""
        os.utime(path)

    def copy_mode(self, source: Path, target: Path) -> None:
        """Give ``target`` the permissions of ``source``."""
        shutil.copymode(source, target)

    def let_library_write(self, folder: Path, write: "Callable[[], object]") -> None:
        """Call ``write``, with which another library writes files of its own in ``folder``; they are not synced.

        Raises:
            OSError: Writing failed; libraries that are not written in Python have errors of their own for it.
        """
        try:
            write()
        except Exception as error:
            if (found := _FOREIGN_ERROR.search(str(error))) and not isinstance(error, OSError):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(folder)) from error
            raise


def _what_no_file(path: Path) -> str:
    """Return what ``path`` is where that is neither a file nor a folder nor a link to one; "" also for what is not there."""
    with suppress(OSError):
        if path.is_symlink() and path.readlink().is_relative_to("/proc"):
            return "a name of an open file"  # /dev/stdout
        mode = path.stat().st_mode
        return next((kind for kind, is_that in _NO_FILES.items() if is_that(mode)), "")
    return ""


_NO_FILES = {
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
}
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CANNOT_BE_MADE = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.ENXIO,
})  # fmt: skip
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
)  # network drives recover from these
TEMPORARY, TRASH = "tmp", "trash"  # what is not whole yet, and what is on its way out
OUTPUT = "out"  # what is not whole yet of a process that does not hold the lock of the folder it is in, if that has one
_SCRATCH = re.compile(rf"\.sft-[0-9a-f]{{16}}-(?P<kind>{TEMPORARY}|{TRASH}|{OUTPUT})(?:-(?P<label>.+))?")
_STALE_SECONDS = 24 * 3600


disk = Disk()


_PIECE_BYTES = 1 << 20
_helper = threading.local()  # ``run``: who does the heavy work of the calling thread


@contextmanager
def heavy_work_by(run: "Callable[[Callable[[], object]], object]") -> "Iterator[None]":
    """Have what the calling thread writes and hashes in this block done by ``run``, a megabyte at a time."""
    _helper.run = run
    try:
        yield
    finally:
        del _helper.run


def _heavy(work: "Callable[[], object]") -> None:
    run = getattr(_helper, "run", None)
    work() if run is None else run(work)


def write_file(path: Path, parts: "Iterable[bytes | memoryview]") -> dict[str, int | str]:
    """Write and sync a new file; return its size and hash as ``bytes`` and ``sha256``, taken on the way to the disk."""
    digest, size = hashlib.sha256(), 0
    with disk.create(path) as file:

        def write(piece: memoryview) -> None:
            disk.write(file, piece)
            digest.update(piece)

        for part in parts:
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            size += len(view)
            for start in range(0, len(view), _PIECE_BYTES):
                _heavy(functools.partial(write, view[start : start + _PIECE_BYTES]))
    disk.sync(path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def scratch_path(parent: Path, kind: str, label: str = "", *, token: str = "") -> Path:
    """Return a new path in ``parent`` for something of ours that has no name yet or has lost it; with ``token`` a known one.

    The token in its name is what tells our leftovers from files of others, which no command may remove or write over.
    """
    return parent / "-".join(filter(None, (f".sft-{(token or secrets.token_hex(8))[:16]}", kind, label)))


def scratch_label(name: str, kind: str) -> str | None:
    """Return the label in a name that ``scratch_path`` gave to something of ``kind``; None for any other name."""
    found = _SCRATCH.fullmatch(name)
    return (found["label"] or "") if found and found["kind"] == kind else None


def replace_file(path: Path, content: bytes, *, kind: str = TEMPORARY) -> None:
    """Put ``content`` in the place of the file ``path``, whole or not at all; ``kind`` is ``OUTPUT`` for who holds no lock."""
    staging = scratch_path(path.parent, kind)
    try:
        write_file(staging, [content])
        disk.rename(staging, path)
    except OSError:
        try_remove_tree(staging)
        raise
    disk.sync(path.parent)


def append_line(file: BinaryIO, line: str) -> None:
    """Write ``line`` and its end at once, so that a crash tears at most the last line."""
    disk.write(file, (line + "\n").encode("utf-8"))


class FileSink(io.RawIOBase):
    """A file to hand to a library that writes into what it is given; each of its writes is one of ``disk``."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file

    def writable(self) -> bool:
        """Return true."""
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of ``data``, which is bytes or a buffer of them."""
        view = memoryview(data).cast("B")
        disk.write(self.file, view)
        return len(view)

    def tell(self) -> int:
        """Return how much was written."""
        return self.file.tell()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def chunks(file: "IO[bytes]") -> "Iterator[bytes]":
    """Yield the rest of a file a megabyte at a time."""
    while chunk := file.read(_PIECE_BYTES):
        yield chunk


def copy_file(source: Path, target: Path) -> None:
    """Copy and sync one file."""
    with source.open("rb") as file:
        write_file(target, chunks(file))


def make_folders(path: Path, *, mode: int = 0o777) -> None:
    """Make ``path`` and its parents where they are missing; their names survive a loss of power."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            try:
                disk.make_folder(folder, mode=mode)
            except FileExistsError:
                if not folder.is_dir():
                    raise
            disk.sync(folder.parent)


def nearest_folder(path: Path) -> Path:
    """Return the lowest of what is there of ``path`` and its parents: where it is made, and on whose disk."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def require_place(path: Path, *, hint: str) -> None:
    """Make sure that ``path`` can be made, before what it is to hold is computed.

    Raises:
        OutputError: What would hold it is a file, or may not be written to; or it is a device.
    """
    if what := _what_no_file(path):
        raise OutputError(f"cannot write {path}: it is {what} and no file", hint=hint)
    above = nearest_folder(path.absolute().parent)
    if not above.is_dir():
        raise OutputError(f"cannot write {path}: {above} is not a folder", hint=hint)
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: {above} may not be written to", hint=hint)


def require_new(path: Path, *, hint: str) -> None:
    """Make sure that ``path`` is not there and can be made.

    Raises:
        OutputError: It exists, or as ``require_place``.
    """
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already", hint=f"{hint}, or delete it")
    require_place(path, hint=hint)


def file_sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in chunks(file):
            _heavy(functools.partial(digest.update, chunk))
    return digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds; links are not followed. What is gone already is no error."""
    try:
        if path.is_dir() and not path.is_symlink():
            for child in sorted(path.iterdir()):
                remove_tree(child)
            disk.remove_folder(path)
        else:
            disk.unlink(path)
    except FileNotFoundError:
        return


def try_remove_tree(path: Path) -> None:
    """Remove what can be removed, in a second try where the disk failed for a moment; the next sweep finds what is left."""
    for _ in range(2):
        with suppress(OSError):
            remove_tree(path)
            return


def discard(path: Path) -> None:
    """Remove a folder so that no moment shows a half of it under its name: rename it, then delete."""
    trash = scratch_path(path.parent, TRASH)
    disk.rename(path, trash)
    disk.sync(path.parent)
    try_remove_tree(trash)


def sweep(folder: Path, *, is_locked: bool = False) -> list[str]:
    """Remove what killed processes of ours left in ``folder`` more than a day ago; return the names.

    Who holds its lock removes at once what only holders write. Nobody else's files are touched.
    """
    removed = []
    for leftover in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _SCRATCH.fullmatch(leftover.name)
        if not found:
            continue
        try:
            age = time.time() - leftover.lstat().st_mtime
        except FileNotFoundError:
            continue
        if age > _STALE_SECONDS or (is_locked and found["kind"] != OUTPUT):
            try_remove_tree(leftover)
            removed.append(leftover.name)
    return removed


@contextmanager
def scratch_folder(parent: Path, *, hint: str, kind: str = TEMPORARY) -> "Iterator[Path]":
    """Yield a new private folder in ``parent`` that is gone afterwards, whatever happens.

    Leftovers of processes that were killed more than a day ago are removed as well.

    Raises:
        StorageError: The disk ran full inside the block.
        OutputError: ``parent`` is not writable.
    """
    require_place(parent / TEMPORARY, hint=hint)
    with storage_errors(parent, hint):
        make_folders(parent, mode=0o700)
        sweep(parent)
        scratch = scratch_path(parent, kind)
        disk.make_folder(scratch, mode=0o700)
        try:
            yield scratch
        finally:
            try_remove_tree(scratch)


@contextmanager
def atomic_folder(target: Path, *, hint: str, is_new: bool = False) -> "Iterator[Path]":
    """Yield a folder beside ``target`` to write in, and put it in the place of ``target`` when the block succeeds.

    Content is synced before it gets its name, so a crash leaves the old folder, no folder or the whole new one. When two
    processes make the same folder, the last one wins; with ``is_new`` the first.

    Raises:
        StorageError, OutputError: As ``scratch_folder``; or with ``is_new`` something is there by now.
    """
    with scratch_folder(target.parent, hint=hint, kind=OUTPUT if is_new else TEMPORARY) as scratch:
        fresh = scratch / "new"
        disk.make_folder(fresh)
        yield fresh
        sync_tree(fresh)
        for attempt in range(5):
            if is_new:
                require_new(target, hint=hint)
            elif target.exists():
                disk.rename(target, scratch / f"old-{attempt}")
            try:
                disk.rename(fresh, target)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # otherwise another process was faster
                    raise
            else:
                break
        disk.sync(target.parent)


@contextmanager
def whole_file(target: Path, *, hint: str, is_new: bool = False) -> "Iterator[Path]":
    """Yield a path to write a file at, and put it in the place of ``target`` when the block succeeds; see ``atomic_folder``.

    With ``is_new``, commands that make the same file are told apart by the lock that they hold.
    """
    with scratch_folder(target.parent, hint=hint, kind=OUTPUT if is_new else TEMPORARY) as scratch:
        fresh = scratch / target.name
        yield fresh
        disk.sync(fresh)
        if is_new:
            require_new(target, hint=hint)
        disk.rename(fresh, target)
        disk.sync(target.parent)


@contextmanager
def storage_errors(folder: Path, hint: str) -> "Iterator[None]":
    """Turn a failed write below ``folder`` into an error that says what to do."""
    try:
        yield
    except SftError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK or _is_below(error.filename, folder):
            raise disk_error(error, folder, hint) from error
        raise


@contextmanager
def writing(path: Path, hint: str) -> "Iterator[None]":
    """Turn every error of the system inside the block, which does nothing but write ``path``, into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, hint) from error


def disk_error(error: OSError, path: Path, hint: str) -> SftError:
    """Return what a failed write of ``path`` is to a user: the one place where the system's numbers get their meaning.

    That is 73 where it cannot be made, as who asked for it can change, and 74 where the disk is full or fails.
    """
    why = error.strerror or str(error)
    if error.errno in FULL_DISK:
        return StorageError(f"the disk that holds {path} is full", hint=f"free space, or {hint}")
    if error.errno in CANNOT_BE_MADE:
        return OutputError(f"cannot write {path}: {why}", hint=hint)
    return StorageError(f"cannot write {path}: {why}", hint=f"see to the disk and run it again, or {hint}")


def _is_below(name: object, folder: Path) -> bool:
    return name is None or (isinstance(name, str) and Path(name).is_relative_to(folder))


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` survive a loss of power."""
    for place, _, files in os.walk(folder):
        for name in sorted(files):
            disk.sync(Path(place, name))
        disk.sync(Path(place))
