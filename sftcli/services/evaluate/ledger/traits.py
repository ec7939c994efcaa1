"""What an answer looks like beside those of its source: its alphabet, its form, its length.

A trait speaks against a row only where nearly all of its neighbors share another one.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from sftcli.services.evaluate.checks.json_values import is_json_text
from sftcli.services.report.ledger import Reason

FEWEST = 20  # rows of a source that are compared with each other
_SHARED = 0.95  # of the neighbors have the trait that a row lacks
_RARE = 0.02  # of them have the one that it has
_FAR = 6.0  # spreads from the median, of the logarithm of the length
_LEAST_SPREAD = 0.25  # of that logarithm: lengths that hardly differ make no small difference a large one
_TO_SIGMA = 1.4826  # from the median distance to the standard deviation of normal values
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
_LIST = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s", re.MULTILINE)
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")


def script_of(text: str) -> str:
    """Return the alphabet that most letters of ``text`` are of, such as ``Latin``; empty where it has no letters."""
    found = Counter(name for character in text if (name := _script(character)))
    return found.most_common(1)[0][0] if found else ""


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return "East Asian" if name in _EAST_ASIAN else name.capitalize()


def form_of(text: str) -> str:
    """Return what kind of text an answer is."""
    if is_json_text(text):
        return "JSON"
    if "```" in text:
        return "text with code"
    if _MARKUP.search(text):
        return "text with markup"
    return "a list" if len(_LIST.findall(text)) > 1 else "plain text"


def odd_traits(sources: Sequence[str], answers: Sequence[str]) -> list[dict[Reason, str]]:
    """Return for each answer in what it differs from nearly all others of its source, in words."""
    found: list[dict[Reason, str]] = [{} for _ in answers]
    groups: Mapping[str, list[int]] = defaultdict(list)
    for row, source in enumerate(sources):
        groups[source].append(row)
    for rows in groups.values():
        if len(rows) < FEWEST:
            continue
        texts = [answers[row] for row in rows]
        for reason, words in _compared(texts):
            for place, text in words.items():
                found[rows[place]][reason] = text
    return found


def _compared(texts: Sequence[str]) -> Iterator[tuple[Reason, Mapping[int, str]]]:
    yield Reason.SCRIPT, _rare(texts, script_of, "most letters are {own}, in {share} of its source {usual}")
    yield Reason.FORMAT, _rare(texts, form_of, "it is {own}, {share} of its source are {usual}")
    yield Reason.LENGTH, _far(texts)


def _rare(texts: Sequence[str], trait: Callable[[str], str], words: str) -> dict[int, str]:
    traits = [trait(text) for text in texts]
    counts = Counter(filter(None, traits))
    usual, most = counts.most_common(1)[0] if counts else ("", 0)
    if not most or most < _SHARED * counts.total():
        return {}
    share = f"{most / counts.total():.0%}"
    return {
        place: words.format(own=own, usual=usual, share=share)
        for place, own in enumerate(traits)
        if own not in ("", usual) and counts[own] <= max(1, _RARE * counts.total())
    }


def _far(texts: Sequence[str]) -> dict[int, str]:
    sizes = np.array([len(text) for text in texts])
    logs = np.log1p(sizes)
    middle = np.median(logs)
    spread = max(_LEAST_SPREAD, _TO_SIGMA * float(np.median(np.abs(logs - middle))))
    usual = int(np.median(sizes))
    return {
        int(place): f"it has {sizes[place]:,} characters, half of its source at most {usual:,}"
        for place in np.flatnonzero(np.abs(logs - middle) > _FAR * spread)
    }
