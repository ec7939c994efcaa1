"""Tables to rows: CSV and TSV with a header line, Parquet, Arrow. Batches are read one by one.

What the libraries raise over a damaged file is the caller's matter.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedReader
from itertools import chain, product
from pathlib import Path
from typing import Any, NoReturn

from sftcli import storage
from sftcli.child import UnfitError, try_first
from sftcli.data.reading.json_rows import Row, check_values
from sftcli.data.reading.text_lines import MAX_LINE_BYTES, ByteStream, Note, data_error, skip_bom, text_lines
from sftcli.errors import first_line

_BATCH_ROWS = 1024
DAMAGED_HINT = "the file is damaged, truncated, or not of the type its name says: copy or download it again"


def csv_rows(stream: ByteStream, name: str, note: Note, *, delimiter: str) -> Iterator[Row]:
    """Yield the rows under a header line, each with the line it begins on; every value is text.

    Raises:
        DataError: A row has not the header's number of fields, a quote is left open, or the header repeats a name.
    """
    offset = skip_bom(stream, name, note)
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (text for _, text in text_lines(stream, name, offset=offset))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        _check_header(header, delimiter, name)
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise data_error(
                        f"the row has {len(row)} fields, the header has {len(header)}",
                        name,
                        line,
                        hint="put a field that holds the separator or a line end in double quotes",
                    )
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise data_error(f"broken CSV in the row that begins here: {error}", name, line) from None


def _check_header(header: list[str], delimiter: str, name: str) -> None:
    if len(header) == 1 and delimiter == "," and (";" in header[0] or "\t" in header[0]):
        raise data_error(
            "the header has one column only and looks not separated by ','",
            name,
            1,
            hint="name a file with tabs .tsv, or convert it to commas",
        )
    twice = sorted(column for column, times in Counter(header).items() if times > 1)
    if twice:
        raise data_error(f"the header has two columns {twice[0]!r}", name, 1)
    if "" in header:
        raise data_error(f"column {header.index('') + 1} has no name in the header", name, 1)


def parquet_rows(stream: BufferedReader, name: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file with their numbers, batch by batch."""
    from pyarrow import parquet

    with parquet.ParquetFile(stream) as file:
        _check_row_groups(file.metadata, name)
        yield from numbered(chain.from_iterable(_dicts(file.iter_batches(_BATCH_ROWS), name)), name)


def _check_row_groups(metadata: Any, name: str) -> None:  # noqa: ANN401 - Arrow has no types
    """Refuse rows that are too large on average, before they are unpacked."""
    first = 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows and (size := group.total_byte_size // group.num_rows) > MAX_LINE_BYTES:
            _refuse_row(first, size, name)
        first += group.num_rows


def num_parquet_rows(path: Path) -> int:
    """Return the number of rows that a Parquet file says it has."""
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def arrow_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, in the file or the stream form, with their numbers.

    Arrow believes what a file says about places and lengths in it, so a child reads and checks the file first.
    """
    import pyarrow

    try_first(
        "sftcli.data.reading.table_rows:check_arrow",
        path,
        storage.file_sha256(path),
        versions=pyarrow.__version__,
        name=name,
        hint=DAMAGED_HINT,
        file_bytes=path.stat().st_size,
    )
    with pyarrow.memory_map(str(path)) as mapped:
        yield from numbered(chain.from_iterable(_dicts(_arrow_batches(mapped), name)), name)


def check_arrow(path: Path) -> None:
    """Check every value of an Arrow file, in a child: this may crash.

    Raises:
        UnfitError: It is damaged.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            for batch in _arrow_batches(mapped):
                batch.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UnfitError(f"cannot be read as Arrow: {first_line(error)}") from None


def _arrow_batches(mapped: Any) -> Iterator[Any]:  # noqa: ANN401 - Arrow has no types
    import pyarrow
    from pyarrow import ipc

    try:
        file = ipc.open_file(mapped)
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        yield from ipc.open_stream(mapped)
    else:
        yield from map(file.get_batch, range(file.num_record_batches))


def _dicts(batches: Iterable[Any], name: str) -> Iterator[list[dict[str, object]]]:
    """Yield the rows of slices of Arrow batches, so that a huge batch is not held as Python values at once.

    Raises:
        DataError: A row is larger than a line of a text file may be.
    """
    done = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            piece = batch.slice(start, _BATCH_ROWS)
            is_large = piece.nbytes > MAX_LINE_BYTES
            for part in (piece.slice(row, 1) for row in range(len(piece))) if is_large else (piece,):
                if part.nbytes > MAX_LINE_BYTES:
                    _refuse_row(done + 1, part.nbytes, name)
                yield arrow_dicts(part)
                done += len(part)


def _refuse_row(number: int, size: int, name: str) -> NoReturn:
    raise data_error(
        f"the row has {size >> 20} MB; the limit is {MAX_LINE_BYTES >> 20} MB",
        name,
        number,
        hint="leave the row out, or cut its text into several rows",
    )


def arrow_dicts(table: object) -> list[dict[str, object]]:
    """Return the rows of an Arrow table or batch.

    A struct has every key in every row, so null inside of a column is a key that the row does not have, and is left out.
    """
    from pyarrow import types

    rows: list[dict[str, object]] = table.to_pylist()  # type: ignore[attr-defined]
    nested = [field.name for field in table.schema if types.is_nested(field.type)]  # type: ignore[attr-defined]
    for row, name in product(rows, nested):
        row[name] = _without_nulls(row[name])
    return rows


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def numbered(rows: Iterable[dict[str, object]], name: str) -> Iterator[Row]:
    """Yield rows that come from no text with their numbers, checked."""
    for number, fields in enumerate(rows, 1):
        check_values(fields, name, number)
        yield number, fields
