"""Files that others made, read by libraries: whatever goes wrong is one error that names the file, the cause and a way out.

Libraries raise what they like over a damaged file: classes of their own, assertions, and panics of Rust, which are no
``Exception``. And their words fit the file's name, not what is in it, which the first bytes tell better.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from sftcli.errors import (
    DataError,
    Location,
    NotFoundError,
    ReportedByPeerError,
    ResourceError,
    SftError,
    StorageError,
    UsageError,
)

AGAIN = "copy or download it again"
_OURS = (SftError, ReportedByPeerError, KeyboardInterrupt, SystemExit, GeneratorExit)
_ALLOCATORS = ("DefaultCPUAllocator", "out of memory")  # torch raises a plain RuntimeError on the CPU
_POINTER_BYTES = 1024  # which the format sets; a larger file is not read for this
_HEAD_BYTES = 64 << 10
# Bytes. If the memory is not enough for so small a file, what it says of sizes is wrong.
_FITS_ANYWHERE = 1 << 20
_MOST_CAUSE = 300  # characters
_STDERR = 2
_one_at_a_time = RLock()


class TooLargeError(DataError):
    """A small file says that there is more in it than the memory could hold."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is, whatever its name says, as words behind that name, and what to do about it."""

    told: str
    hint: str = AGAIN
    is_text: bool = False  # in another encoding


_POINTER = Kind(
    "is a pointer of Git LFS, not the file itself", "fetch the files: run git lfs pull in their folder"
)
_PAGE = Kind("is an HTML page, such as the error page of a download", "download the file again, logged in where that is asked for")  # fmt: skip
_TEXT_16, _TEXT_32 = (
    Kind(f"is UTF-{bits} text, expected UTF-8", f"convert it: iconv -f utf-{bits} -t utf-8", is_text=True)
    for bits in (16, 32)
)
_PICKLE = Kind(
    "is a pickle, which can run code when it is opened", "convert it to safetensors where you trust the file"
)
# First bytes -> what begins so, and the endings of names that say so already. Of several that fit, the first counts.
_KINDS: tuple[tuple[bytes, Kind, tuple[str, ...]], ...] = (
    (b"version https://git-lfs", _POINTER, ()),
    (b"<!doctype html", _PAGE, (".html",)),
    (b"<html", _PAGE, (".html",)),
    (b"\xff\xfe\0\0", _TEXT_32, ()),
    (b"\0\0\xfe\xff", _TEXT_32, ()),
    (b"\xff\xfe", _TEXT_16, ()),
    (b"\xfe\xff", _TEXT_16, ()),
    (b"\x1f\x8b", Kind("is compressed (gzip)", "unpack it: gunzip"), (".gz",)),
    (b"\x28\xb5\x2f\xfd", Kind("is compressed (zstd)", "unpack it: unzstd"), (".zst",)),
    (b"BZh", Kind("is compressed (bzip2)", "unpack it: bunzip2"), ()),
    (b"\xfd7zXZ", Kind("is compressed (xz)", "unpack it: unxz"), ()),
    (b"PK\x03\x04", Kind("is a zip archive", "unpack it, or convert it where you trust it"), (".pt", ".zip")),
    *((b"\x80" + bytes([version]), _PICKLE, (".pt",)) for version in range(2, 6)),
    (b"GGUF", Kind("is a GGUF file", "name it .gguf"), (".gguf",)),
    (b"PAR1", Kind("is a Parquet file", "name it .parquet"), (".parquet",)),
    (b"ARROW1", Kind("is an Arrow file", "name it .arrow"), (".arrow",)),
)
_EMPTY, _ZEROS = Kind("is empty"), Kind("holds zeros only")


@contextmanager
def foreign_file(
    path: Path, fault: str = "cannot be read", *, name: str = "", hint: str = AGAIN
) -> Iterator[None]:
    """Turn whatever is raised while ``path``, a file or the folder of a model, is read into an error that names it.

    Errors of this program pass, and so does what ends it.

    Args:
        path: What is read.
        fault: What to say of it; the cause follows.
        name: How the user knows it, if otherwise.
        hint: What to do where its first bytes do not tell.

    Raises:
        DataError: It is not what a library takes, or it is another kind of file.
        UsageError: A package is missing that it needs.
        NotFoundError, StorageError: It is not there, or the disk does not give it.
        ResourceError: Memory has run out.
    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:  # a panic of Rust is one
        raise _told(error, path, fault, name or str(path), hint) from error


def damaged(path: Path, cause: str, *, name: str = "", hint: str = AGAIN) -> DataError:
    """Return the error for ``path``: ``cause`` behind its name, or what it is where its first bytes tell that."""
    for file in _suspects(path):
        if kind := kind_of(file):
            shown = name if name and file == path else str(file)
            return DataError(f"{shown} {kind.told}", hint=kind.hint, location=Location(file=shown))
    return DataError(f"{name or path} {cause}", hint=hint, location=Location(file=name or str(path)))


def kind_of(file: Path) -> Kind | None:
    """Return what ``file`` is where that is not what its name says; None where nothing tells."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return None
    if not head.strip(b"\0"):
        return _ZEROS if head else _EMPTY
    start = head if head[:2] in (b"\xff\xfe", b"\0\0") else head.lstrip()
    for sign, kind, endings in _KINDS:
        if start[: len(sign)].lower() == sign.lower():
            return None if file.suffix in endings else kind
    return None


def refuse_pointer(file: Path, name: str) -> None:
    """Raise where ``file`` stands for another one that was not fetched: as text it could be read without a fault.

    Raises:
        DataError: It does.
    """
    if file.is_file() and file.stat().st_size < _POINTER_BYTES and kind_of(file) is _POINTER:
        raise damaged(file, "", name=name)


@contextmanager
def without_panics() -> Iterator[None]:
    """Keep libraries from writing to standard error meanwhile: Rust tells of a panic there by itself, with its trace."""
    with _one_at_a_time:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # it is closed
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDERR)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)


def _told(error: BaseException, path: Path, fault: str, name: str, hint: str) -> SftError:
    place = Location(file=name)
    text = f"{name} {fault}: {_cause(error)}"
    if isinstance(error, MemoryError) or any(word in str(error) for word in _ALLOCATORS):
        if sum(file.stat().st_size for file in _suspects(path) if file.is_file()) < _FITS_ANYWHERE:
            return TooLargeError(
                f"{name} {fault}: it says that it is larger than the memory", hint=hint, location=place
            )
        return ResourceError(
            f"there is not enough memory to read {name}",
            hint="use a machine with more, or a smaller file",
            location=place,
        )
    if isinstance(error, ImportError):
        return UsageError(text, hint="install the package, or use another file", location=place)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"{error.filename or name} does not exist", hint=hint, location=place)
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return StorageError(f"{name} cannot be read: {error.strerror or error}", location=place)
    return damaged(path, f"{fault}: {_cause(error)}", name=name, hint=hint)


def _cause(error: BaseException) -> str:
    """Return in a line what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    match error:
        case RecursionError():
            return "its parts are nested too deeply"
        case KeyError():
            return f"{text} is missing or not known"
        case OSError(errno=errno.EINVAL):  # of a seek to before the beginning
            return "it leads to places that it has not"
        case _ if not text:
            return f"a check of its content fails ({type(error).__name__})"
    return text if len(text) <= _MOST_CAUSE else f"{text[:_MOST_CAUSE]}..."


def _suspects(path: Path) -> list[Path]:
    """Return the files that may be at fault: ``path``, or those of a model folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
