"""Sources to rows, one after another, in bounded memory, each with the place it came from.

This is the front of reading: ``source`` understands what the user names, ``json_rows``, ``table_rows`` and ``hub_rows``
know one kind of storage each. What the columns mean is not known here.
"""

import hashlib
import heapq
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path

from sftcli.data.reading.json_rows import Row, json_rows
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.source import COMPRESSIONS, RowLimit, Source, SourceKind, row_format
from sftcli.data.reading.table_rows import arrow_rows, csv_rows, parquet_rows
from sftcli.data.reading.text_lines import Note, open_bytes
from sftcli.errors import DataError, Location, StorageError, UsageError


def _no_note(_: str) -> None:
    pass


def read_records(source: Source, *, seed: int, note: Note = _no_note) -> Iterator[RawRecord]:
    """Yield the rows of ``source`` in their order.

    With ``source.sample`` it is a sample without replacement. Which rows are in it depends on ``seed`` and on how many
    there are, and on nothing else; a smaller sample of the same seed is part of a larger one. The
    source is then read twice, for a share of the rows three times.

    Args:
        source: What to read.
        seed: Chooses the sample.
        note: Receives what a person should know about the source.

    Raises:
        DataError: A file is broken, holds no rows, or changed while it was read.
        UsageError: More rows are asked for than there are.
        NetworkError, NotFoundError, ConsentError: The hub does not give the dataset.
        StorageError: A file cannot be read.
    """
    if source.skipped:
        note(f"{source.name}: skipped, not a known data format: {', '.join(source.skipped)}")
    read = _reader(source, note)
    rows = read() if source.sample is None else _sample(read, source, source.sample, seed)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{source.name}: no rows", location=Location(file=source.name))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells the content of a source from any other, and its files from those that stood there at another time."""

    content: str  # a hash of the files' names and bytes
    files: tuple[tuple[int, int, int], ...]  # their identities; none for the hub


def fingerprint_source(source: Source) -> Fingerprint:
    """Return what changes when the rows of ``source``, or the names of their files, have changed.

    Raises:
        StorageError: A file cannot be read.
        NetworkError, NotFoundError, ConsentError: The hub does not give the dataset.
    """
    digest = hashlib.blake2b(source.text.encode("utf-8", "surrogateescape"), digest_size=16)
    if source.kind is SourceKind.HUB:
        from sftcli.data.reading.hub_rows import load_split

        for file in load_split(source, _no_note).cache_files:
            path = Path(file["filename"])
            digest.update(f"{path}\0{path.stat().st_size}\0".encode())
    identities = []
    for path in source.files:
        digest.update(f"{source.label(path)}\0".encode("utf-8", "surrogateescape"))
        try:
            identities.append(_identity(path))
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise _unreadable(source.label(path), error) from None
    return Fingerprint(digest.hexdigest(), tuple(identities))


def _sample(
    read: Callable[[], Iterator[RawRecord]], source: Source, sample: RowLimit, seed: int
) -> Iterator[RawRecord]:
    """Return the rows whose hashes of seed and index are smallest: the same on every machine, in any Python."""
    key = seed.to_bytes(8, "big", signed=True)
    size = sample.rows or sample.size(sum(1 for _ in read()))
    heap: list[
        tuple[int, int]
    ] = []  # hash and index of the sample so far, negated: the largest hash is on top
    total = 0
    for index, _ in enumerate(read()):
        total += 1
        rank = hashlib.blake2b(index.to_bytes(8, "big"), digest_size=8, key=key).digest()
        entry = (-int.from_bytes(rank, "big"), -index)
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    if 0 < total < size:
        raise UsageError(
            f"{source.text!r} asks for {size} rows, but there are only {total}",
            hint=f"leave out :{size} to take all",
        )
    chosen = {-index for _, index in heap}
    return (record for index, record in enumerate(read()) if index in chosen)


def _reader(source: Source, note: Note) -> Callable[[], Iterator[RawRecord]]:
    """Return a function that reads all rows, each time from the start. Notes come the first time only."""
    if source.kind is SourceKind.HUB:
        from sftcli.data.reading.hub_rows import load_split, split_rows

        name = f"{source.name}@{source.split}" if source.split else source.name
        read = split_rows(load_split(source, note), name)
        return lambda: _as_records(read(), name)
    said = set[str]()

    def note_once(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    def read_files() -> Iterator[RawRecord]:
        for path in source.files:
            name = source.label(path)
            yield from _as_records(_file_rows(path, name, note_once), name)

    return read_files


def _as_records(rows: Iterable[Row], name: str) -> Iterator[RawRecord]:
    for line, fields in rows:
        yield RawRecord(fields=fields, origin=Origin(path=name, line=line))


def _file_rows(path: Path, name: str, note: Note) -> Iterator[Row]:
    """Yield the rows of one file, and fail if it is not the same file at the end as at the start."""
    try:
        before = _identity(path)
        yield from _rows_by_format(path, name, note)
        after = _identity(path)
    except (EOFError, BadGzipFile, zlib.error) as error:
        raise _damaged(path, name, error) from None
    except OSError as error:
        # The zstd decompressor raises it too, without a number.
        raise _damaged(path, name, error) if error.errno is None else _unreadable(name, error) from None
    if before != after:
        raise DataError(
            f"{name}: the file changed while it was read",
            hint="wait until the file is complete, then run again",
            location=Location(file=name),
        )


def _rows_by_format(path: Path, name: str, note: Note) -> Iterator[Row]:
    kind = row_format(path)
    if kind == "parquet":
        yield from parquet_rows(path, name)
    elif kind == "arrow":
        yield from arrow_rows(path, name)
    else:
        stream = open_bytes(path)
        try:
            if kind in ("csv", "tsv"):
                yield from csv_rows(stream, name, note, delimiter="\t" if kind == "tsv" else ",")
            else:
                yield from json_rows(stream, name, note)
        finally:
            stream.close()


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _damaged(path: Path, name: str, error: Exception) -> DataError:
    kind = path.suffix if path.suffix in COMPRESSIONS else "compressed"
    return DataError(
        f"{name}: truncated or damaged {kind} file: {error}",
        hint="copy or download it again",
        location=Location(file=name),
    )


def _unreadable(name: str, error: OSError) -> StorageError:
    return StorageError(f"{name}: cannot be read: {error.strerror or error}", location=Location(file=name))
