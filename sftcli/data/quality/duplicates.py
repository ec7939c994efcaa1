"""Rows that were there before, equal but for case and white space, and rows that are nearly so.

Equal rows have equal hashes of their normalized turns. For near ones every row gets a MinHash signature of its word
sequences (``rensa`` makes it); rows are compared where signatures agree in one of 16 bands, each with the row before it
and with the first one that agree with it there. So the time is linear in the rows, and a row takes 160 bytes, however
long it is. System texts do not count: what all rows share would make short ones alike.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sftcli.data.conversations.heldout_split import digest_texts, normalize, row_key
from sftcli.data.conversations.messages import Conversation, PlainText, TokenRow
from sftcli.data.reading.record import Origin

NEAR = 0.8  # share of word sequences that near copies have in common, as the signatures estimate it
HASHES = 64
SEED = 1
WINDOW_BYTES = 16  # from the start of a word: about three words
EXAMPLES = 5
_GAP = b"\0" * WINDOW_BYTES
_BETWEEN_TURNS = " \0 "  # no row that was read holds a NUL
_ROWS_COMPARED = 1 << 13
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], dtype=np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Rows of one split that repeat an earlier one: how many, and the first few as (row, earlier row).

    ``near`` rows are not ``exact`` ones. ``near_trained`` rows repeat a training row exactly or nearly; it is 0 for
    training rows.
    """

    exact: int = 0
    near: int = 0
    near_trained: int = 0
    exact_examples: tuple[tuple[Origin, Origin], ...] = ()
    near_examples: tuple[tuple[Origin, Origin], ...] = ()
    trained_examples: tuple[tuple[Origin, Origin], ...] = ()


_STAYS, _EQUAL, _NEARLY = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """Rows, in the order in which they were taken: ``kinds`` (rows,) tells which repeat another one, ``like`` (rows,) which."""

    kinds: npt.NDArray[np.uint8]
    like: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]  # (rows, 3): path, line, side
    paths: Sequence[str]

    def is_exact(self, row: int) -> bool | None:
        """Return whether a row equals another one that stays; None where it stays itself."""
        return None if self.kinds[row] == _STAYS else bool(self.kinds[row] == _EQUAL)

    def named(self, row: int) -> str:
        """Return a row and the one that it repeats."""
        one, other = (
            Origin(path=self.paths[path], line=line)
            for path, line in self.places[[row, self.like[row]], :2].tolist()
        )
        return f"{one} like {other}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What rows are told apart by: their hashes (rows,), and signatures (rows, HASHES)."""

    keys: npt.NDArray[np.uint64]
    signatures: npt.NDArray[np.uint16]


def mark_rows(rows: Sequence[Conversation | PlainText | TokenRow]) -> Marks:
    """Return the marks of ``rows``; those of a row do not depend on the others."""
    if not rows:
        return Marks(keys=np.empty(0, np.uint64), signatures=np.empty((0, HASHES), np.uint16))
    keys, texts = zip(*map(_key_and_text, rows), strict=True)
    return Marks(keys=np.frombuffer(b"".join(keys), dtype="<u8"), signatures=_signatures(texts))


def repeated_in(rows: Marks, others: Marks) -> npt.NDArray[np.bool_]:
    """Return which of ``rows`` (rows,) are equal or nearly equal to one of ``others``; none of them is missed.

    Two signatures that differ in so few hashes agree in at least one band, so that others need no look.
    """
    found: npt.NDArray[np.bool_] = np.isin(rows.keys, others.keys)
    bands, other_bands = rows.signatures.view("<u8"), others.signatures.view("<u8")
    shares_band = np.zeros(len(found), dtype=np.bool_)
    for band in range(bands.shape[1]):
        shares_band |= np.isin(bands[:, band], other_bands[:, band])
    for row in np.flatnonzero(shares_band & ~found):
        found[row] = (np.mean(others.signatures == rows.signatures[row], axis=1) >= NEAR).any()
    return found


class DuplicateFinder:
    """Takes the marks of rows as they come, and finds the duplicates among them when all are there."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._places = array("q")  # of each row: path, line, is held out
        self._keys, self._signatures = (
            bytearray(),
            bytearray(),
        )  # which grow in place, and are never there twice

    def add(self, marks: Marks, origins: Sequence[Origin], heldout: Sequence[bool]) -> None:
        """Take rows that are kept."""
        for origin, is_held in zip(origins, heldout, strict=True):
            path = self._paths.setdefault(origin.path, len(self._paths))
            self._places.extend((path, origin.line, is_held))
        self._keys += marks.keys.tobytes()
        self._signatures += marks.signatures.tobytes()

    def repeated(self, *, exact: bool, near: bool, seed: int) -> "Repeated":
        """Return which rows repeat another one of their side, so that one of each is left: ``seed`` draws it.

        Args:
            exact: Whether equal rows are meant.
            near: Whether nearly equal ones are.
            seed: Gives the order in which rows are preferred.
        """
        count = len(self._places) // 3
        like = np.full(count, -1, dtype=np.int64)
        kinds = np.full(count, _STAYS, dtype=np.uint8)
        rank = np.random.default_rng(seed).permutation(count)
        if exact and count:
            # Sides have keys of their own, so that no row loses to one of the other side.
            keys = np.frombuffer(self._keys, dtype=np.uint64) ^ self._sides().astype(np.uint64)
            by_rank = np.argsort(rank)
            pairs = by_rank[_earlier(keys[by_rank])]
            like[pairs[:, 0]], kinds[pairs[:, 0]] = pairs[:, 1], _EQUAL
        while near and len(pairs := self._near_within(kinds == _STAYS)):
            _drop_neighbors(pairs, rank, like, kinds)
        paths = list(self._paths)
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        return Repeated(kinds=kinds, like=like, places=places, paths=paths)

    def _sides(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)[:, 2].astype(bool)

    def _near_within(self, left: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return pairs of rows that are alike, of one side and not two answers of a row, among those that are ``left``."""
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        signatures = np.frombuffer(self._signatures, dtype=np.uint16).reshape(-1, HASHES)
        found = [np.empty((0, 2), dtype=np.int64)]
        for side in (self._sides(), ~self._sides()):  # one by one: of many rows not all pairs are looked at
            rows = np.flatnonzero(left & side)
            if len(rows):
                found.append(rows[_near_pairs(np.ascontiguousarray(signatures[rows]))])
        pairs = np.concatenate(found)
        apart = (places[pairs[:, 0], :2] != places[pairs[:, 1], :2]).any(axis=1)
        within: npt.NDArray[np.int64] = pairs[apart]
        return within

    def find(self) -> tuple[Duplicates, Duplicates]:
        """Return the duplicates among the training rows and among the held-out rows."""
        if not self._places:
            return Duplicates(), Duplicates()
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        heldout = places[:, 2].astype(bool)
        equal = _earlier(np.frombuffer(self._keys, dtype=np.uint64))
        signatures = np.frombuffer(self._signatures, dtype=np.uint16).reshape(-1, HASHES)
        near = _near_pairs(signatures)
        near = near[
            (places[near[:, 0], :2] != places[near[:, 1], :2]).any(axis=1)
        ]  # not two answers of a row
        train, held = (self._among(places, side, equal, near) for side in (~heldout, heldout))
        across = np.concatenate([equal, near])
        across = across[heldout[across[:, 0]] != heldout[across[:, 1]]]
        across = np.where(heldout[across[:, :1]], across, across[:, ::-1])  # the held-out row first
        trained, examples = self._count(places, across)
        return train, Duplicates(
            exact=held.exact,
            near=held.near,
            near_trained=trained,
            exact_examples=held.exact_examples,
            near_examples=held.near_examples,
            trained_examples=examples,
        )

    def _among(
        self,
        places: npt.NDArray[np.int64],
        side: npt.NDArray[np.bool_],
        equal: npt.NDArray[np.int64],
        near: npt.NDArray[np.int64],
    ) -> Duplicates:
        equal = equal[side[equal].all(axis=1)]
        near = near[side[near].all(axis=1)]
        near = near[~np.isin(near[:, 0], equal[:, 0])]
        exact_count, exact_examples = self._count(places, equal)
        near_count, near_examples = self._count(places, near)
        return Duplicates(
            exact=exact_count, near=near_count, exact_examples=exact_examples, near_examples=near_examples
        )

    def _count(
        self, places: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]
    ) -> tuple[int, tuple[tuple[Origin, Origin], ...]]:
        """Return the number of rows that come first in ``pairs`` (n, 2), and the first few of them with their pair."""
        rows, first = np.unique(pairs[:, 0], return_index=True)
        paths = list(self._paths)

        def origin(row: int) -> Origin:
            return Origin(path=paths[int(places[row, 0])], line=int(places[row, 1]))

        examples = tuple(
            (origin(int(row)), origin(int(other))) for row, other in pairs[first[:EXAMPLES]].tolist()
        )
        return len(rows), examples


def _drop_neighbors(
    pairs: npt.NDArray[np.int64],
    rank: npt.NDArray[np.int64],
    like: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.uint8],
) -> None:
    """Go through the rows of ``pairs`` by ``rank``: one that is left stays, and those that are like it go."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(rank[both[:, 0]], kind="stable")]
    for row, other in both.tolist():
        if kinds[row] == _STAYS and kinds[other] == _STAYS:
            like[other], kinds[other] = row, _NEARLY


def _key_and_text(row: Conversation | PlainText | TokenRow) -> tuple[bytes, bytes]:
    """Return the hash of a row and the text that its signature is made of."""
    if isinstance(row, TokenRow):
        return row_key(row)[:8], " ".join(map(str, row.input_ids)).encode()
    if isinstance(row, PlainText):
        text = normalize(row.text)
        return digest_texts(["text", text])[:8], text.encode()
    normal = normalize(_BETWEEN_TURNS.join([turn.content for turn in row.messages]))
    fixed = [part for turn in row.messages for part in (turn.role, turn.tool_calls)]
    said = normal.partition("\0")[2] if row.messages[0].role == "system" else normal
    return digest_texts([row.tools, *fixed, normal])[:8], said.replace("\0 ", "").encode()


def _signatures(texts: Sequence[bytes]) -> npt.NDArray[np.uint16]:
    """Return the lower halves of MinHash signatures (texts, HASHES)."""
    from rensa import RMinHash

    data = np.frombuffer(_GAP + _GAP.join(texts) + _GAP, dtype=np.uint8)
    here, before = data[1:], data[:-1]
    # A word starts behind a space; every character that is not ASCII starts one, for scripts without spaces.
    is_start = ((before <= 0x20) & (here > 0x20)) | (here >= 0xC0)
    starts = np.flatnonzero(is_start[: len(data) - WINDOW_BYTES]) + 1
    windows = np.lib.stride_tricks.sliding_window_view(data, WINDOW_BYTES)[starts].view("<u8")
    hashes = (windows[:, 0] ^ (windows[:, 1] * _MIX[0] + _MIX[1])) * _MIX[2]
    hashes ^= hashes >> np.uint64(29)
    begins = np.cumsum([0, *(len(text) + WINDOW_BYTES for text in texts)])
    offsets = np.searchsorted(starts, begins).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, HASHES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).astype(np.uint16)


def _earlier(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return (row, first row with the same key) for every row that has an earlier one, in order: (n, 2)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    return np.stack([again, first[inverse][again]], axis=1)


def _near_pairs(signatures: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Return (row, earlier row) for the rows found alike, sorted: (n, 2)."""
    bands = signatures.view("<u8")  # four hashes a band
    count = len(signatures)
    found = np.empty(0, dtype=np.int64)  # row * count + earlier row
    for band in range(bands.shape[1]):
        keys = bands[:, band]
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        neighbors = np.stack([order[again + 1], order[again]], axis=1)
        fresh = [found]
        for pairs in (neighbors, _earlier(keys)):
            for part in np.split(pairs, range(_ROWS_COMPARED, len(pairs), _ROWS_COMPARED)):
                near = part[_similar(signatures, part)]
                fresh.append(near[:, 0] * count + near[:, 1])
        found = _sorted_once(np.concatenate(fresh))
    return np.stack(np.divmod(found, count), axis=1)


def _sorted_once(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what ``np.unique`` does for numbers from 0; that one keeps a hash table, many times slower for these."""
    numbers.sort()
    once: npt.NDArray[np.int64] = numbers[np.diff(numbers, prepend=-1) != 0]
    return once


def _similar(signatures: npt.NDArray[np.uint16], pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    near: npt.NDArray[np.bool_] = np.mean(signatures[pairs[:, 0]] == signatures[pairs[:, 1]], axis=1) >= NEAR
    return near
