"""Files that a user names, opened and read without waiting or growing for ever: they may be pipes, devices or very large."""

import os
import stat
from io import BufferedReader
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from sftcli.errors import DataError, Location, StorageError

MAX_BYTES = 128 << 20  # of a file that is read whole
WRITER_SECONDS = 10.0


def read_whole(path: Path, *, name: str = "", most_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file; ``name`` is what messages call it.

    Raises:
        DataError: It has more than ``most_bytes``, which a device may have without end.
        StorageError: It is a pipe that nobody writes to.
        OSError: It cannot be read.
    """
    name = name or str(path)
    with open_input(path, name=name) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
    if max(size, len(content)) > most_bytes:
        what = f"has {size >> 20} MB" if size else "does not end"
        raise DataError(
            f"{name} {what}; more than {most_bytes >> 20} MB are not read", location=Location(file=name)
        )
    return content


def read_whole_text(path: Path, *, most_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file in UTF-8, whose lines may end as on any system; see ``read_whole``.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
    """
    content = read_whole(path, most_bytes=most_bytes).decode("utf-8")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def open_input(path: Path, *, name: str = "") -> BufferedReader:
    """Open a file to be read; of a pipe with a name, wait for somebody who writes, but not for ever.

    Raises:
        StorageError: It is a pipe that nobody writes to.
        OSError: It cannot be opened.
    """
    if not stat.S_ISFIFO(path.stat().st_mode):
        return path.open("rb")
    opened: SimpleQueue[BufferedReader | OSError] = SimpleQueue()
    Thread(target=_open_pipe, args=(path, opened), daemon=True).start()
    try:
        pipe = opened.get(timeout=WRITER_SECONDS)
    except Empty:
        both_ends = os.open(path, os.O_RDWR)  # so that the thread ends
        if isinstance(late := opened.get(), BufferedReader):
            late.close()
        os.close(both_ends)
        name = name or str(path)
        raise StorageError(
            f"{name} is a pipe, and in {WRITER_SECONDS:.0f} seconds no program wrote to it",
            hint="start the program that writes before this one",
            location=Location(file=name),
        ) from None
    if isinstance(pipe, OSError):
        raise pipe
    return pipe


def _open_pipe(path: Path, opened: "SimpleQueue[BufferedReader | OSError]") -> None:
    try:
        opened.put(path.open("rb"))
    except OSError as error:
        opened.put(error)


def is_device(path: Path) -> bool:
    """Return whether ``path`` is a device, such as /dev/zero, which has no end."""
    mode = path.stat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
