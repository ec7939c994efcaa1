"""Held-out rows with their answers for people: the prompt without what all prompts share, right or wrong, and differences."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Literal

from sftcli.services.report.score import AnsweredRow, Miss

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_MAX_WORDS = 2_000  # the comparison takes the square of them
_MOST_WRONG = 4
_ALIKE = 0.5  # of answers that are less like the expected one, no difference is shown: all would be marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of an answer: as expected, not expected, or expected and missing."""

    kind: Literal["same", "extra", "missing"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model answered to a row."""

    who: str
    is_right: bool
    is_cut: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out row with the answers of the models."""

    prompt: str
    expected: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts without the lines that all of them begin or end with, such as a system text and the names of roles."""

    shared: str
    own: tuple[str, ...]


def split_prompts(prompts: Sequence[str]) -> Prompts:
    """Take out the whole lines at both ends that are the same in every prompt; nothing of a single one."""
    lines = [prompt.strip("\n").split("\n") for prompt in prompts]
    if len({*prompts}) < 2:
        return Prompts(shared="", own=tuple(prompts))
    head = _alike(lines)
    tail = _alike([one[head:][::-1] for one in lines])
    own = ["\n".join(one[head : len(one) - tail]).strip("\n") for one in lines]
    if not all(own):  # one prompt is the beginning of another
        return Prompts(shared="", own=tuple(prompts))
    first = lines[0]
    shared = "\n".join([*first[:head], *(["..."] if head or tail else []), *first[len(first) - tail :]])
    return Prompts(shared=shared, own=tuple(own))


def _alike(lines: Sequence[Sequence[str]]) -> int:
    """Return how many lines at the beginning of all are the same."""
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*lines, strict=False)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The rows that are kept of an evaluation, a few that the tuned model got wrong, and what all of their prompts share."""

    rows: tuple[Sample, ...]
    wrong: tuple[Sample, ...]
    shared: str

    @property
    def have_differences(self) -> bool:
        """Whether a difference is marked in one of the answers."""
        return any(len(answer.pieces) > 1 for row in (*self.rows, *self.wrong) for answer in row.answers)


def samples_of(kept: Sequence[AnsweredRow], misses: Sequence[Miss]) -> Samples:
    """Return the samples of ``eval.json``, and the first of ``misses`` that are not among them."""
    known = {(row.prompt, row.tuned) for row in kept}
    missed = [
        AnsweredRow(prompt=one.prompt, expected=one.expected, base=None, tuned=one.answer, tuned_cut=one.cut)
        for one in misses
        if (one.prompt, one.answer) not in known
    ][:_MOST_WRONG]
    found = [*kept, *missed]
    prompts = split_prompts([row.prompt for row in found])
    samples = [
        Sample(prompt=prompt, expected=row.expected, answers=tuple(_answers(row)))
        for prompt, row in zip(prompts.own, found, strict=True)
    ]
    return Samples(rows=tuple(samples[: len(kept)]), wrong=tuple(samples[len(kept) :]), shared=prompts.shared)


def _answers(row: AnsweredRow) -> Iterator[Answer]:
    for who, text, is_cut in (("base", row.base, row.base_cut), ("tuned", row.tuned, row.tuned_cut)):
        if text is not None:
            is_right = text == row.expected and not is_cut
            pieces = compare_texts(row.expected, text) if text else ()
            yield Answer(who=who, is_right=is_right, is_cut=is_cut, pieces=pieces)


def compare_texts(expected: str, text: str) -> tuple[Piece, ...]:
    """Return ``text`` in pieces that differ from ``expected`` word by word, with the missing ones; whole where little is alike."""
    want, have = _WORDS.findall(expected), _WORDS.findall(text)
    whole = (Piece(kind="same", text=text),)
    if len(want) > _MAX_WORDS or len(have) > _MAX_WORDS:
        return whole
    matcher = SequenceMatcher(None, want, have, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return whole
    pieces: list[Piece] = []
    for kind, first, last, begin, end in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece(kind="same", text="".join(have[begin:end])))
            continue
        if last > first:
            pieces.append(Piece(kind="missing", text="".join(want[first:last])))
        if end > begin:
            pieces.append(Piece(kind="extra", text="".join(have[begin:end])))
    return tuple(pieces)
