"""Rows of two prepared data sets: which are in one alone, which have other content, which changed sides."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from sftcli.data.prepared.store import SPLITS, PreparedDataset
from sftcli.data.reading.record import Origin
from sftcli.services.diff.pairing import pairs_by


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRow:
    """A row with other content: its places before and after, and which part of it is another one."""

    before: str
    after: str
    part: str  # answer, or prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRow:
    """A row with the same content in another split."""

    origin: str  # in the later data
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChanges:
    """What differs between the rows of two runs; places are ``file:line``."""

    same: int
    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    changed: tuple[ChangedRow, ...] = ()
    moved: tuple[MovedRow, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    split: str
    origin: str
    digest: bytes  # of all its tokens
    prompt: bytes  # of those before the first trained one


def changed_rows(before: PreparedDataset, after: PreparedDataset) -> RowChanges:
    """Return what differs. Rows with equal tokens are equal, wherever they stand in their files; copies count each.

    Of the others, those with the same prompt are one row that was changed, and so are those at the same place.
    """
    first, second = _rows(before), _rows(after)
    same = [
        *_take_pairs(first, second, lambda row: (row.digest, row.split, row.origin)),
        *_take_pairs(first, second, lambda row: (row.digest, row.split)),
    ]
    moved = _take_pairs(first, second, lambda row: row.digest)
    answers = _take_pairs(first, second, lambda row: row.prompt)
    prompts = _take_pairs(first, second, lambda row: row.origin)
    return RowChanges(
        same=len(same),
        added=tuple(row.origin for row in second),
        gone=tuple(row.origin for row in first),
        changed=tuple(
            ChangedRow(before=one.origin, after=other.origin, part=part)
            for part, pairs in (("answer", answers), ("prompt", prompts))
            for one, other in pairs
        ),
        moved=tuple(
            MovedRow(origin=other.origin, before=one.split, after=other.split) for one, other in moved
        ),
    )


def _rows(dataset: PreparedDataset) -> list[_Row]:
    """Return the rows of all splits, in the order of their files."""
    found = [
        _Row(split, origin, digest, prompt)
        for split in SPLITS
        for origin, (digest, prompt) in _keyed(dataset, split)
    ]
    return sorted(found, key=lambda row: _place(row.origin))


def _keyed(dataset: PreparedDataset, split: str) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    table = {"train": dataset.train, "heldout": dataset.heldout, "text": dataset.text}[split]
    return zip(
        (str(Origin(path=path, line=line)) for path, line in table.origins()), table.keys(), strict=True
    )


def _place(origin: str) -> tuple[str, int]:
    path, _, line = origin.rpartition(":")
    return path, int(line) if line.isdigit() else 0


def _take_pairs(
    first: list[_Row], second: list[_Row], key: Callable[[_Row], Hashable]
) -> list[tuple[_Row, _Row]]:
    """Take the rows with an equal ``key`` out of both lists and return them in pairs, in the order of the second list."""
    pairs = list(pairs_by(key, first, second))
    taken = {id(row) for pair in pairs for row in pair}
    first[:] = [row for row in first if id(row) not in taken]
    second[:] = [row for row in second if id(row) not in taken]
    return pairs
