"""The bytes of a file in blocks, each with its hash, so that whoever reads them a second time knows them again.

A source is read once for its fingerprint and once for its rows. What the second reading hands out is what the first one
hashed, block by block, or it is refused: a file that changes between the two never gives rows under the other's name.
"""

import os
from hashlib import sha256
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.errors import DataError, Location

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 1 << 20


class BlockFile(RawIOBase):
    """The file at ``path``, of which ``digests`` has the hash of every block.

    Where they are not known yet, the file has to be read in its order, and they are added on the way; else every block
    is compared with its own.
    """

    def __init__(self, path: Path, name: str, digests: list[bytes], *, is_known: bool) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._name = name
        self._digests, self._is_known = digests, is_known
        self._position = 0
        self._number, self._block = -1, b""

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return whether blocks can be taken in any order."""
        return self._is_known

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to another place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.fstat(self._file.fileno()).st_size if begin is None else begin)
        return self._position

    def tell(self) -> int:
        """Return the place."""
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Read up to the end of the block.

        Raises:
            DataError: The block is not the one that is known.
        """
        view = memoryview(buffer).cast("B")
        number, start = divmod(self._position, BLOCK_BYTES)
        piece = memoryview(self._taken(number))[start : start + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _taken(self, number: int) -> bytes:
        if number != self._number:
            self._file.seek(number * BLOCK_BYTES)
            self._number, self._block = number, self._file.read(BLOCK_BYTES)
            self._see(number, self._block)
        return self._block

    def _see(self, number: int, block: bytes) -> None:
        digest = sha256(block).digest() if block else b""
        if not self._is_known:
            self._digests += [digest] if block else []
        elif digest != (self._digests[number] if number < len(self._digests) else b""):
            raise changed_error(self._name)


def hash_rest(path: Path, digests: list[bytes]) -> int:
    """Add the hashes of the blocks of a file that are behind those of ``digests``; return how many lines these have."""
    lines, end = 0, b"\n"
    with path.open("rb") as file:
        file.seek(len(digests) * BLOCK_BYTES)
        while block := file.read(BLOCK_BYTES):
            digests.append(sha256(block).digest())
            lines, end = lines + block.count(b"\n"), block[-1:]
    return lines + (end != b"\n")


def buffered(file: BlockFile) -> BufferedReader:
    """Return a stream of ``file`` that hands out as much as it is asked for."""
    return BufferedReader(file, BLOCK_BYTES)


def changed_error(name: str) -> DataError:
    """Return the refusal of a source that is another than the one that is known."""
    return DataError(
        f"{name}: changed while being prepared; nothing was saved",
        hint="wait until the file is complete, then run again",
        location=Location(file=name),
    )
