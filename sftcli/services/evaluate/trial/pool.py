"""The training rows that may stand in front of a held-out question as examples, and the choice among them.

A row that repeats a held-out one, whether asked or not, is none of them: it has the first user text of a held-out row, or
is equal or nearly equal to one, as ``prepare`` counts duplicates. Rows that are compared by their prompts are compared by
the same signatures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sftcli.data.conversations.heldout_split import digest_texts, split_key
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.quality.duplicates import Marks, mark_rows, repeated_in
from sftcli.errors import StoppedError
from sftcli.events import Progressed, Session

_ROWS_AT_ONCE = 1024


def turns_of(row: Conversation) -> tuple[Message, ...]:
    """Return the messages of ``row`` without the system text that it begins with."""
    return row.messages[1:] if _system_of(row) else row.messages


def question_turns(row: Conversation) -> tuple[Message, ...]:
    """Return what stands before the last trained answer of ``row``."""
    last = max(index for index, message in enumerate(row.messages) if message.trained)
    return row.messages[:last]


def _system_of(row: Conversation) -> str:
    first = row.messages[0]
    return first.content if first.role == "system" else ""


def _frame_of(row: Conversation) -> bytes:
    """Return a hash of what stands in a prompt once: system text, tools, variables of the template."""
    return digest_texts([_system_of(row), row.tools, row.variables])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scan:
    """What is asked about rows. ``wholes`` are the marks of the rows, ``prompts`` those of what stands before their answers."""

    first_texts: Sequence[bytes]
    frames: Sequence[bytes]
    wholes: Marks
    prompts: Marks
    begins_asking: npt.NDArray[np.bool_]


class ExamplePool:
    """Training rows by what decides whether, and for which question, they are shown.

    Args:
        rows: Those of the training split.
        heldout: All that are held out.
        seed: Draws the order in which rows are taken that nothing else puts in order.
        session: Is told how far it is, and stops it.
    """

    def __init__(
        self, rows: Sequence[Conversation], heldout: Sequence[Conversation], *, seed: int, session: Session
    ) -> None:
        held, own = (
            _scan(side, _teller(f"comparing {name} rows", len(side), session))
            for name, side in (("held-out", heldout), ("training", rows))
        )
        held_texts = frozenset(held.first_texts)
        repeats = repeated_in(own.wholes, held.wholes)
        repeats |= np.array([text in held_texts for text in own.first_texts], dtype=np.bool_)
        self.repeats = int(repeats.sum())  # rows that repeat a held-out one
        self._rows, self._seed = rows, seed
        self._places = np.flatnonzero(own.begins_asking & ~repeats)
        self._keys = own.wholes.keys[self._places]
        self._signatures = own.prompts.signatures[self._places]
        self._frames: dict[bytes, int] = {}
        numbers = [self._frames.setdefault(frame, len(self._frames)) for frame in own.frames]
        self._frame_numbers = np.array(numbers, dtype=np.int64)[self._places]

    def draw(self, question: Conversation, number: int, count: int) -> list[Conversation]:
        """Return at most ``count`` rows, drawn for the held-out row ``number``, no two of them equal."""
        return self._first(self._drawn(question, number), count)

    def nearest(self, question: Conversation, number: int, count: int) -> list[Conversation]:
        """Return the rows with the most similar prompts, the nearest first; those as similar in the order of ``draw``."""
        drawn = self._drawn(question, number)
        own = mark_rows([replace(question, messages=question_turns(question))]).signatures
        shared = (self._signatures[drawn] == own).sum(axis=1, dtype=np.int16)
        return self._first(drawn[np.argsort(-shared, kind="stable")], count)

    def _drawn(self, question: Conversation, number: int) -> npt.NDArray[np.int64]:
        """Return all rows with the system text, tools and variables of ``question``, in an order drawn for it."""
        frame = self._frames.get(_frame_of(question), -1)
        fitting = np.flatnonzero(self._frame_numbers == frame)
        drawn: npt.NDArray[np.int64] = np.random.default_rng([self._seed, number]).permutation(fitting)
        return drawn

    def _first(self, order: npt.NDArray[np.int64], count: int) -> list[Conversation]:
        chosen: dict[int, int] = {}
        for index in order:
            if len(chosen) == count:
                break
            chosen.setdefault(int(self._keys[index]), int(self._places[index]))
        return [self._rows[place] for place in chosen.values()]


def _teller(task: str, total: int, session: Session) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if session.stop.requested():
            raise StoppedError
        session.emit(Progressed(task=task, done=done, total=total))

    return tell


def _scan(rows: Sequence[Conversation], tell: Callable[[int], None]) -> _Scan:
    parts = []
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        tell(begin)
        parts.append(_scan_part(rows[begin : begin + _ROWS_AT_ONCE]))
    tell(len(rows))
    return _Scan(
        first_texts=[text for part in parts for text in part.first_texts],
        frames=[frame for part in parts for frame in part.frames],
        wholes=_joined(part.wholes for part in parts),
        prompts=_joined(part.prompts for part in parts),
        begins_asking=np.concatenate([np.empty(0, np.bool_), *(part.begins_asking for part in parts)]),
    )


def _scan_part(rows: Sequence[Conversation]) -> _Scan:
    begins_asking = [turns_of(row)[0].role == "user" for row in rows]
    asked = [
        replace(row, messages=question_turns(row)) if asks else row
        for row, asks in zip(rows, begins_asking, strict=True)
    ]
    return _Scan(
        first_texts=[split_key(row) for row in rows],
        frames=[_frame_of(row) for row in rows],
        wholes=mark_rows(rows),
        prompts=mark_rows(asked),
        begins_asking=np.array(begins_asking, dtype=np.bool_),
    )


def _joined(parts: Iterator[Marks]) -> Marks:
    all_parts = [mark_rows([]), *parts]
    return Marks(
        keys=np.concatenate([part.keys for part in all_parts]),
        signatures=np.concatenate([part.signatures for part in all_parts]),
    )
