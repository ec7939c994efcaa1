"""The operations that change a disk. Nothing else in this program opens a file for writing, moves one or removes one."""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable

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
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``; a file of that name is replaced in the same moment."""
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
