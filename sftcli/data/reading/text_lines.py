r"""Bytes of a text file to checked lines: decompression, UTF-8 or UTF-16, NUL, a byte order mark, lines without end.

Lines end at ``\n`` and nowhere else, so text may hold U+2028 and its kin. Every fault is a `DataError` with its place.
"""

import codecs
import gzip
from collections.abc import Callable, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from sftcli.errors import DataError, Location

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_LINE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 16 * 2**20  # of a plain text, all of which is one row
# What a compressed file may unpack to: text packs to a twentieth of its size, a bomb to a thousandth and less.
MAX_RATIO = 200
MIN_UNPACKED_BYTES = 64 * 2**20
BOM = b"\xef\xbb\xbf"
_UTF16, _UTF32 = (b"\xff\xfe", b"\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")

Note = Callable[[str], None]
"""Receives one line that a person wants to read about a source."""


def no_note(_: str) -> None:
    """Take a line that nobody reads."""


class ByteStream(Protocol):
    """A buffered binary stream that may not be seekable: a file, a pipe, a decompressor."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, fewer only at the end."""
        ...

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return one line with its end, or its first ``size`` bytes."""
        ...

    def peek(self, size: int = 0, /) -> bytes:
        """Return at least one byte without moving on, none only at the end."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def data_error(message: str, name: str, line: int, column: int | None = None, *, hint: str = "") -> DataError:
    """Return an error whose message begins with the place it was found at."""
    place = Location(file=name, line=line, column=column)
    return DataError(f"{place}: {message}", hint=hint, location=place)


def unpacked(stream: BufferedReader, path: Path) -> ByteStream:
    """Return what ``stream``, the bytes of the file at ``path``, unpacks to by the file's name."""
    if path.suffix == ".gz":
        return _bounded(cast("ByteStream", gzip.open(stream, "rb")), path)
    if path.suffix == ".zst":
        import pyarrow

        return _bounded(pyarrow.input_stream(stream, compression="zstd"), path)
    return stream


class _Bounded(RawIOBase):
    """An unpacked stream that ends in an error where it grows out of all proportion."""

    def __init__(self, stream: "ByteStream", path: Path) -> None:
        super().__init__()
        self.stream, self.path, self.count = stream, path, 0
        self.most = max(MIN_UNPACKED_BYTES, MAX_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.stream.read(len(view))
        view[: len(data)] = data
        self.count += len(data)
        if self.count > self.most:
            raise DataError(
                f"{self.path}: decompresses to more than {MAX_RATIO}x its size; refused as a possible archive bomb",
                hint="if you trust the file, decompress it yourself",
                location=Location(file=str(self.path)),
            )
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _bounded(stream: "ByteStream", path: Path) -> ByteStream:
    return BufferedReader(_Bounded(stream, path), 2**20)


class _Recoded(RawIOBase):
    """A stream of UTF-16 as UTF-8."""

    def __init__(self, stream: "ByteStream", name: str) -> None:
        super().__init__()
        self._stream, self._name, self._left, self._line = stream, name, b"", 1
        self._decoder = codecs.getincrementaldecoder("utf-16")()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = b"?"
        while not self._left and data:
            data = self._stream.read(2**16)
            try:
                self._left = self._decoder.decode(data, final=not data).encode()
            except UnicodeDecodeError as error:
                raise data_error(f"broken UTF-16: {error.reason}", self._name, self._line) from None
            self._line += self._left.count(b"\n")
        piece, self._left = self._left[: len(view)], self._left[len(view) :]
        view[: len(piece)] = piece
        return len(piece)


def as_utf8(stream: ByteStream, name: str, note: Note) -> ByteStream:
    """Return ``stream`` as it is, or as UTF-8 where its byte order mark is that of UTF-16."""
    head = stream.peek(4)[:4]
    if head[:2] not in _UTF16 or head in _UTF32:
        return stream
    note(f"{name}: is UTF-16, by its byte order mark")
    return BufferedReader(_Recoded(stream, name), 2**16)


def skip_bom(stream: ByteStream, name: str, note: Note) -> int:
    """Move past a byte order mark at the start of ``stream`` and return its length in bytes.

    Raises:
        DataError: It is UTF-32, or UTF-16 without a mark.
    """
    head = stream.peek(4)[:4]
    if head in _UTF32 or b"\0" in head:
        kind = "UTF-32" if head in _UTF32 or head[1:3] == b"\0\0" else "UTF-16 without a byte order mark"
        encoding = "utf-32" if kind == "UTF-32" else "utf-16le" if head[:1] != b"\0" else "utf-16be"
        raise data_error(f"the file is {kind}, expected UTF-8", name, 1, hint=_convert_hint(encoding, name))
    if head[:3] != BOM:
        return 0
    stream.read(3)
    note(f"{name}: starts with a byte order mark, which is skipped")
    return 3


def text_lines(stream: ByteStream, name: str, *, line: int = 1, offset: int = 0) -> Iterator[tuple[int, str]]:
    """Yield each line with its number and its end, as text.

    Args:
        stream: Where to read on.
        name: The file's name in messages.
        line: Number of the first line, 1-based.
        offset: Bytes of the file before ``stream``'s position.
    """
    while data := stream.readline(MAX_LINE_BYTES + 1):
        if len(data) > MAX_LINE_BYTES:
            raise data_error(
                f"the line is longer than {MAX_LINE_BYTES // 2**20} MB",
                name,
                line,
                hint="write one row per line, with line ends between the rows",
            )
        yield line, decode(data, name, line=line, offset=offset)
        offset += len(data)
        line += 1


def plain_text(stream: ByteStream, name: str, note: Note) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield all of a file as one row with a text; nothing where it is blank.

    Raises:
        DataError: It is too long.
    """
    text = whole_text(
        stream,
        name,
        note,
        max_bytes=MAX_TEXT_BYTES,
        too_long=f"plain text of more than {MAX_TEXT_BYTES // 2**20} MB is not read as one text",
        hint='write JSON lines, {"text": "..."} for each piece, or several files into a folder',
    )
    if text.strip():
        yield 1, {"text": text}


def whole_text(stream: ByteStream, name: str, note: Note, *, max_bytes: int, too_long: str, hint: str) -> str:
    """Return all of a file as text.

    Raises:
        DataError: It has more than ``max_bytes``, in the words of ``too_long`` and ``hint``, or is not UTF-8.
    """
    offset = skip_bom(stream, name, note)
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise data_error(too_long, name, 1, hint=hint)
    return decode(data, name, line=1, offset=offset)


def decode(data: bytes, name: str, *, line: int, offset: int) -> str:
    """Return ``data`` as text; it starts at ``line`` and at byte ``offset`` of the file.

    Raises:
        DataError: It is not UTF-8, or it holds a NUL.
    """
    if b"\0" in data:
        position = data.index(b"\0")
        raise data_error(
            f"a NUL byte stands at byte {offset + position} of the file",
            name,
            line + data.count(b"\n", 0, position),
            hint=f"remove it, for example: tr -d '\\000' < {name} > clean",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = error.start
    bad = data[position]
    encoding = "cp1252" if 0x80 <= bad <= 0x9F else "latin1"
    raise data_error(
        f"byte 0x{bad:02x} at byte {offset + position} of the file is not UTF-8",
        name,
        line + data.count(b"\n", 0, position),
        hint=f"looks like {_ENCODING_NAMES[encoding]}: {_convert_hint(encoding, name)}",
    )


_ENCODING_NAMES = {"cp1252": "Windows-1252", "latin1": "Latin-1"}


def _convert_hint(encoding: str, name: str) -> str:
    return f"iconv -f {encoding} -t utf-8 {name} > utf8-{Path(name).name}"


def excerpt(text: str, column: int, *, width: int = 72) -> str:
    """Return the part of a line around the 1-based ``column`` with a caret below it, on two lines of their own."""
    line = text.rstrip("\r\n")
    start = max(0, min(column - 1 - width // 2, len(line) - width))
    shown = "".join(
        character if character.isprintable() else "·" for character in line[start : start + width]
    )
    return f"\n  {shown}\n  {' ' * (column - 1 - start)}^"
