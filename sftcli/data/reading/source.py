"""What the user names as data: ``NAME[:ROWS][@split][#config]`` to files, standard input, or a hub dataset.

``ROWS`` is a number or a share of the rows, how many times an epoch has each, or both: ``5000``, ``25%``, ``x3``, ``5000x3``.

A path that exists wins as a whole, whatever signs it holds; only then are suffixes taken off, from the right. What can be
read only once, standard input or a pipe, is copied to a temporary file first, since rows are read more than once.
"""

import atexit
import os
import re
import secrets
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import gettempdir
from typing import IO

from sftcli import storage
from sftcli.errors import DataError, Location, NotFoundError, StorageError, UsageError
from sftcli.input_files import is_device, open_input
from sftcli.suggest import did_you_mean

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_BESIDE_ROWS = ("yaml", "text")  # settings and notes, where a folder has files of other kinds
_OF_TABLES = ("parquet", "arrow")  # which are never compressed as a whole
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
STDIN = "-"
_KNOWN = f"known are {', '.join(FORMATS)}, the text ones also with {' and '.join(COMPRESSIONS)}"
_PRESET = "preset:"
_ROWS = re.compile(
    r"(?:(?P<rows>[0-9]{1,3}(?:_?[0-9]{3})*|[0-9]{1,12})|(?P<percent>[0-9]{1,3}(?:\.[0-9]+)?)%)?(?:x(?P<times>[0-9]{1,3}))?"
)
MAX_TIMES = 100
_OPTION = re.compile(r"(?P<name>.+)(?P<mark>[:@#])(?P<value>[^:@#/\\]+)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_OWN_FILES = {"dataset_info.json", "dataset_dict.json", "state.json"}  # of `datasets`, beside its rows


class SourceKind(StrEnum):
    """Where rows come from."""

    FILES = "files"
    PIPE = "pipe"  # read once, into a temporary file that lives as long as the process
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class RowLimit:
    """How many of the rows are taken: ``rows`` of them, or ``percent`` of 100."""

    rows: int | None = None
    percent: float | None = None

    def size(self, total: int) -> int:
        """Return the number of rows taken of ``total``; a share of some rows is at least one."""
        if self.rows is not None:
            return self.rows
        return max(min(total, 1), round(total * (self.percent or 0) / 100))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source of rows, found but not yet opened."""

    text: str  # as the user wrote it
    name: str  # without options
    kind: SourceKind
    files: tuple[Path, ...] = ()  # empty for the hub
    skipped: tuple[str, ...] = ()  # names in the folder that hold no rows this program can read
    sample: "RowLimit | None" = None  # all rows when None
    times: int = 1  # an epoch has each row
    split: str | None = None
    config: str | None = None

    def label(self, path: Path) -> str:
        """Return the name of one of the files in messages and origins."""
        return self.name if self.kind is SourceKind.PIPE else printable(str(path))


def printable(name: str) -> str:
    r"""Return the name of a file with those bytes that are not UTF-8 as ``\xe9``, so that it can be written down."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def parse_source(text: str) -> Source:
    """Return the source that ``text`` names.

    Raises:
        UsageError: An option is not one, or does not fit the source.
        NotFoundError: It can only be a local path, and nothing is there.
        DataError: The file or folder holds nothing of a known kind.
        StorageError: A pipe cannot be read or copied.
    """
    rest, options = text, dict[str, str]()
    while not _is_here(rest) and (match := _OPTION.fullmatch(rest)) and rest != _preset_part(match):
        if match["mark"] in options:
            raise UsageError(f"{text!r} has two options {match['mark']!r}", hint=_GRAMMAR)
        options[match["mark"]] = match["value"]
        rest = match["name"]
    (sample, times), split, config = _rows(options.get(":"), text), options.get("@"), options.get("#")
    if rest == STDIN:
        _no_hub_options(options, text)
        return Source(
            text=text, name="stdin", kind=SourceKind.PIPE, files=(_stdin_copy(),), sample=sample, times=times
        )
    if path := _local_path(rest):
        _no_hub_options(options, text)
        if not path.is_file() and not path.is_dir():
            return Source(
                text=text,
                name=rest,
                kind=SourceKind.PIPE,
                files=(_pipe_copy(path),),
                sample=sample,
                times=times,
            )
        files, skipped = _row_files(path, rest)
        return Source(
            text=text,
            name=rest,
            kind=SourceKind.FILES,
            files=files,
            skipped=skipped,
            sample=sample,
            times=times,
        )
    if not rest or not _is_hub_name(rest):
        raise NotFoundError(
            f"no file or folder {rest or text!r}", hint=near_files(rest), location=Location(file=rest)
        )
    return Source(
        text=text, name=rest, kind=SourceKind.HUB, sample=sample, times=times, split=split, config=config
    )


_GRAMMAR = (
    "write a source as NAME[:ROWS][@split][#config], ROWS as 5000 (a sample), 25% (a share), x3 (each row 3 times an"
    " epoch) or 5000x3"
)


def _preset_part(match: re.Match[str]) -> str:
    """Return the whole text where its only sign is the one in ``preset:``."""
    return match.string if f"{match['name']}{match['mark']}" == _PRESET else ""


def _is_here(name: str) -> bool:
    if name == STDIN:
        return True
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, holds a NUL, or an unknown user's home
        return False


def _local_path(name: str) -> Path | None:
    if name.startswith(_PRESET) and not _is_here(name):
        from sftcli.config.presets import preset_file

        return preset_file(name)
    return Path(name).expanduser() if _is_here(name) else None


def _stdin_copy() -> Path:
    if sys.stdin.isatty():
        raise UsageError(
            "standard input is a terminal", hint="pipe rows into it: cat rows.jsonl | sft prepare -"
        )
    return _copy(sys.stdin.buffer, "")


def _pipe_copy(path: Path) -> Path:
    try:
        if is_device(path):
            raise StorageError(
                f"{path} is a device, not a file of rows",
                hint="name a file, or pipe rows in",
                location=Location(file=str(path)),
            )
        with open_input(path) as stream:
            return _copy(stream, "".join(path.suffixes[-2:]))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read: {error.strerror}", location=Location(file=str(path))
        ) from None


def _copy(stream: IO[bytes], suffix: str) -> Path:
    path = Path(gettempdir(), f"sft-{secrets.token_hex(8)}{suffix}")
    atexit.register(storage.try_remove_tree, path)
    try:
        with storage.disk.create_alone(path, mode=0o600) as copy:
            for chunk in storage.chunks(stream):
                storage.disk.write(copy, chunk)
    except OSError as error:
        raise StorageError(
            f"piped rows cannot be stored in {path.parent}: {error.strerror}",
            hint="set TMPDIR to a folder with more space",
        ) from None
    return path


def _rows(value: str | None, text: str) -> tuple[RowLimit | None, int]:
    """Return the sample that ``ROWS`` asks for, and how many times an epoch has its rows."""
    if value is None:
        return None, 1
    match = _ROWS.fullmatch(value)
    if not match:
        raise UsageError(f"{text!r}: {value!r} is not a row count, percentage or repetition", hint=_GRAMMAR)
    times = int(match["times"] or 1)
    if not 1 <= times <= MAX_TIMES:
        raise UsageError(f"{text!r}: rows can be repeated 1 to {MAX_TIMES} times, not {times}", hint=_GRAMMAR)
    if match["percent"]:
        percent = float(match["percent"])
        if not 0 < percent <= 100:
            raise UsageError(f"{text!r}: {match['percent']}% must be above 0 and at most 100", hint=_GRAMMAR)
        return RowLimit(percent=percent), times
    if match["rows"] and not int(match["rows"]):
        raise UsageError(f"{text!r}: {value!r} must be above 0 rows", hint=_GRAMMAR)
    return RowLimit(rows=int(match["rows"])) if match["rows"] else None, times


def _no_hub_options(options: dict[str, str], text: str) -> None:
    for mark, what in (("@", "split"), ("#", "config")):
        if mark in options:
            raise UsageError(
                f"{text!r}: the {what} {options[mark]!r} applies to hub datasets, and this is a local source",
                hint=f"leave out {mark}{options[mark]} and name the file instead",
            )


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and row_format(Path(name)) is None


def row_format(path: Path) -> str | None:
    """Return how rows are written in a file of this name, or None where the name does not say."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        known = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if known in _OF_TABLES else known
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _row_files(path: Path, name: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files with rows that ``path`` stands for, and the names that were passed over."""
    if not path.is_dir():
        # A file without a suffix can be anything: it is read as JSON, which says what is wrong.
        if row_format(path) or not path.suffix:
            return (path,), ()
        raise DataError(f"{name}: {_unreadable(path)}", hint=_KNOWN, location=Location(file=name))
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    known = [
        entry for entry in inside if entry.is_file() and row_format(entry) and entry.name not in _OWN_FILES
    ]
    files = [entry for entry in known if row_format(entry) not in _BESIDE_ROWS]
    for kind in _BESIDE_ROWS:
        files = files or [entry for entry in known if row_format(entry) == kind]
    if not files:
        folders = [entry for entry in inside if entry.is_dir()]
        hint = (
            f"name one of its folders, such as {folders[0]}" if folders else f"known are {', '.join(FORMATS)}"
        )
        raise DataError(f"{name}: the folder contains no data files", hint=hint, location=Location(file=name))
    skipped = [
        printable(entry.name) for entry in inside if entry not in files and entry.name not in _OWN_FILES
    ]
    return tuple(files), tuple(skipped)


def _unreadable(path: Path) -> str:
    suffix = "".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix
    return f"rows cannot be read from a {suffix} file"


def near_files(name: str) -> str:
    """Return "did you mean 'x'?" for a mistyped path, from the names in its folder; empty when none is near."""
    path = Path(name).expanduser()
    try:
        names = [printable(entry.name) for entry in path.parent.iterdir()]
    except OSError:
        return f"there is no folder {str(path.parent)!r} either"
    guess = did_you_mean(path.name, names)
    if guess and path.parent != Path():
        return guess.replace("'", f"'{path.parent}/", 1)
    return guess
