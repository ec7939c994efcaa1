"""Sources to rows, one after another, in bounded memory, each with the place it came from.

This is the front of reading: ``source`` understands what the user names, ``json_rows``, ``table_rows`` and ``hub_rows``
know one kind of storage each. What the columns mean is not known here.
"""

import hashlib
import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.data.reading.blocks import BLOCK_BYTES, BlockFile, buffered, changed_error, hash_rest
from sftcli.data.reading.json_rows import Row, json_rows
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.source import COMPRESSIONS, JSON_LINES, RowLimit, Source, SourceKind, row_format
from sftcli.data.reading.table_rows import DAMAGED_HINT, arrow_rows, csv_rows, num_parquet_rows, parquet_rows
from sftcli.data.reading.text_lines import ByteStream, Note, as_utf8, no_note, plain_text, unpacked
from sftcli.data.reading.yaml_rows import yaml_rows
from sftcli.errors import DataError, Location, UsageError
from sftcli.foreign import damaged, foreign_file, kind_of, refuse_pointer

if TYPE_CHECKING:
    from sftcli.data.reading.hub_rows import Split

_IN_WORDS = {"parquet": "Parquet", "arrow": "Arrow", "text": "text"}


def read_records(
    source: Source, *, seed: int, known: "Fingerprint | None" = None, note: Note = no_note
) -> Iterator[RawRecord]:
    """Yield the rows of ``source`` in their order.

    With ``source.sample`` it is a sample without replacement. Which rows are in it depends on ``seed`` and on how many
    there are, and on nothing else; a smaller sample of the same seed is part of a larger one.

    Args:
        source: What to read.
        seed: Chooses the sample.
        known: What the source has to be. Without it, a sample is counted first, in a reading of its own.
        note: Receives what a person should know about the source.

    Raises:
        DataError: A file is broken, holds no rows, changed while it was read, or is not the one that is ``known``.
        UsageError: More rows are asked for than there are.
        NetworkError, NotFoundError, ConsentError: The hub does not give the dataset.
        StorageError: A file cannot be read.
    """
    if source.skipped:
        note(f"{source.name}: skipped, not a known data format: {', '.join(source.skipped)}")
    if texts := sum(row_format(path) == "text" for path in source.files):
        note(f"{source.name}: plain text, {'one text' if texts == 1 else f'{texts} texts, one a file'}")
    if source.sample is None:
        rows = _all_records(source, known, note)
    else:
        total = sum(1 for _ in _all_records(source, known, note)) if known is None else known.rows
        chosen = _sample(source, source.sample, total, seed)
        everything = _all_records(source, known, no_note if known is None else note)
        rows = (record for index, record in enumerate(everything) if index in chosen)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{source.name}: no rows", location=Location(file=source.name))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells the content of a source from any other, found in one reading of it.

    ``blocks`` has the hashes of each file's blocks. ``rows`` is how many rows there are where a sample is taken of them; else
    how many lines JSON lines have, for whoever wants to know how long it will take, and 0 for other files.
    """

    content: str  # a hash of the files' names and bytes
    blocks: Mapping[Path, list[bytes]]
    rows: int = 0


def fingerprint_source(source: Source) -> Fingerprint:
    """Return what changes when the rows of ``source``, or the names of their files, have changed.

    Raises:
        DataError: The rows are counted for a sample, and one is broken.
        StorageError: A file cannot be read.
        NetworkError, NotFoundError, ConsentError: The hub does not give the dataset.
    """
    if source.kind is SourceKind.HUB:
        from sftcli.data.reading.hub_rows import load_split

        split = load_split(source, no_note)
        return Fingerprint(_hub_content(source, split), {}, len(split))
    digest = hashlib.blake2b(source.text.encode("utf-8", "surrogateescape"), digest_size=16)
    blocks, rows, lines = dict[Path, list[bytes]](), 0, 0
    for path in source.files:
        name = source.label(path)
        digests = blocks[path] = list[bytes]()
        with _reading(path, name):
            if source.sample is not None:
                rows += _count_rows(path, name, digests)
            lines += hash_rest(path, digests)
        digest.update(f"{name}\0{len(digests)}\0".encode("utf-8", "surrogateescape"))
        digest.update(b"".join(digests))
    if source.sample is None and all(path.suffix.lower() in JSON_LINES for path in source.files):
        rows = lines
    return Fingerprint(digest.hexdigest(), blocks, rows)


def _hub_content(source: Source, split: "Split") -> str:
    """Go by the names and sizes of the files in the hub's cache, which names them by their content."""
    digest = hashlib.blake2b(source.text.encode("utf-8", "surrogateescape"), digest_size=16)
    for file in split.cache_files:
        path = Path(file["filename"])
        digest.update(f"{path}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def _count_rows(path: Path, name: str, digests: list[bytes]) -> int:
    """Return the number of rows; where they have to be read for it in their order, hash the file on the way."""
    kind = row_format(path)
    if kind == "parquet":
        return num_parquet_rows(path)
    if kind == "arrow":
        return sum(1 for _ in arrow_rows(path, name))
    with buffered(BlockFile(path, name, digests, is_known=False)) as stream:
        rows = _text_rows(unpacked(stream, path), path, name, no_note)
        return sum(1 for _ in _checked(rows, path, name))


def _sample(source: Source, sample: RowLimit, total: int, seed: int) -> frozenset[int]:
    """Return the indices whose hashes with seed are smallest: the same on every machine, in any Python."""
    key, size = seed.to_bytes(8, "big", signed=True), sample.size(total)
    if 0 < total < size:
        raise UsageError(
            f"{source.text!r} asks for {size} rows, but there are only {total}",
            hint=f"leave out :{size} to take all",
        )

    def rank(index: int) -> tuple[bytes, int]:
        return hashlib.blake2b(index.to_bytes(8, "big"), digest_size=8, key=key).digest(), index

    return frozenset(heapq.nsmallest(size, range(total), key=rank))


def _all_records(source: Source, known: Fingerprint | None, note: Note) -> Iterator[RawRecord]:
    """Yield all rows, in their order."""
    if source.kind is SourceKind.HUB:
        from sftcli.data.reading.hub_rows import load_split, split_rows

        name = f"{source.name}@{source.split}" if source.split else source.name
        split = load_split(source, note)
        if known is not None and _hub_content(source, split) != known.content:
            raise changed_error(name)
        yield from _as_records(split_rows(split, name)(), name)
        return
    for path in source.files:
        name = source.label(path)
        blocks = None if known is None else known.blocks[path]
        yield from _as_records(_checked(_file_rows(path, name, blocks, note), path, name), name)


def _as_records(rows: Iterable[Row], name: str) -> Iterator[RawRecord]:
    for line, fields in rows:
        yield RawRecord(fields=fields, origin=Origin(path=name, line=line))


def _checked(rows: Iterator[Row], path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of one file, and fail if it is not the same file at the end as at the start."""
    with _reading(path, name):
        before = _identity(path)
        refuse_pointer(path, name)
        yield from _told_kind(rows, path, name)
        after = _identity(path)
    if before != after:
        raise DataError(
            f"{name}: the file changed while it was read",
            hint="wait until the file is complete, then run again",
            location=Location(file=name),
        )


def _file_rows(path: Path, name: str, blocks: list[bytes] | None, note: Note) -> Iterator[Row]:
    """Yield the rows of one file, whose bytes have to be those of ``blocks``."""
    with (
        path.open("rb")
        if blocks is None
        else buffered(BlockFile(path, name, blocks, is_known=True)) as stream
    ):
        kind = row_format(path)
        if kind == "parquet":
            yield from parquet_rows(stream, name)
        elif kind == "arrow":  # mapped, since one batch may be all of the file
            yield from arrow_rows(path, name)
        else:
            text = unpacked(stream, path)  # held on to: where it goes, the stream is closed
            yield from _text_rows(text, path, name, note)
        # Parquet is read here and there, and looked at where it is read.
        if blocks is not None and kind != "parquet":
            stream.seek(0 if kind == "arrow" else stream.tell())
            deque(iter(lambda: stream.read(BLOCK_BYTES), b""), maxlen=0)


def _text_rows(text: ByteStream, path: Path, name: str, note: Note) -> Iterator[Row]:
    text, kind = as_utf8(text, name, note), row_format(path)
    if kind == "text":
        yield from plain_text(text, name, note)
    elif kind == "yaml":
        yield from yaml_rows(text, name, note)
    elif kind in ("csv", "tsv"):
        yield from csv_rows(text, name, note, delimiter="\t" if kind == "tsv" else ",")
    else:
        yield from json_rows(text, name, note)


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _told_kind(rows: Iterator[Row], path: Path, name: str) -> Iterator[Row]:
    """Yield ``rows``; where they end in a fault because the file is of another kind than its name says, that is told."""
    try:
        yield from rows
    except DataError as error:
        kind = kind_of(path)
        if kind is None or kind.is_text:
            raise
        raise damaged(path, "", name=name) from error


def _reading(path: Path, name: str) -> AbstractContextManager[None]:
    words = _IN_WORDS.get(kind := row_format(path) or "json", kind.upper())
    is_packed = path.suffix in COMPRESSIONS
    fault = f"is a truncated or damaged {path.suffix} file" if is_packed else f"cannot be read as {words}"
    return foreign_file(path, fault, name=name, hint=DAMAGED_HINT)
