"""Loss masks of templates with ``{% generation %}`` against ours, and the kinds of difference that have an explanation."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import combinations, zip_longest
from typing import Any


class Kind(StrEnum):
    """How the trained text of an answer differs from that of the twin. None of them is an error, for the reason behind its name."""

    EQUAL = "equal"
    LINE_END = "line end"  # the twin trains the white space behind the stop token, which nobody generates
    TOKEN = "token alone"  # and a token behind the conversation, or in front of an answer whose white space it swallowed
    OTHER_STOP = (
        "other stop token"  # the template writes none behind the last answer, or the twin trains none
    )
    LEAD = "lead"  # an empty thought or a channel is trained by the one that has it behind the prompt of generation
    HEADER = "header"  # the prompt of generation has it, or the opening of a thought, and the twin trains it
    SPACE = "white space"  # of the row: one of the two takes it away, or writes its own
    THINKING = "thinking"  # one of the two templates does not read it, takes it out of earlier answers, or has other tags
    REFUSED = "refused by the twin"


_LEADS = re.compile(
    r"\s*(?:<think>\s*</think>|</think>|<\|channel>thought\s*<channel\|>|<\|channel\|>final<\|message\|>|\[THINK\]\s*\[/THINK\])\s*"
)
_ANSWERS = re.compile(
    r"(?:<\|start\|>assistant)?(?:<\|channel\|>final| to=user)<\|message\|>|\A<\Stool\Soutputs\Send\S>"
)
_OPENING = re.compile(r"\s*(?:<think>|<\|channel>thought|\[THINK\])\s*")
_THOUGHT = re.compile(
    r"\s*(?:(?:<think>)?.*?</think>|(?:<\|channel>thought)?.*?<channel\|>"
    r"|<\|channel\|>analysis<\|message\|>.*?<\|end\|>(?:<\|start\|>assistant)?| to=self<\|message\|>.*?<\|eom\|>(?:<\|start\|>assistant)?)\s*",
    re.DOTALL,
)


def spans_of(ids: Sequence[int], mask: Sequence[int], stop_ids: frozenset[int]) -> Iterator[list[int]]:
    """Yield runs of trained tokens, each up to a stop token: neighbors may have become one."""
    span: list[int] = []
    for token, is_trained in zip(ids, mask, strict=True):
        if is_trained:
            span.append(token)
        if span and (not is_trained or token in stop_ids):
            yield span
            span = []
    if span:
        yield span


def twin_spans(
    tokenizer: Any, twin: str, messages: Sequence[Any], tools: Any, stop_ids: frozenset[int]
) -> list[str] | None:
    """Return what is trained of ``messages`` by the mask of the template ``twin``; None where it refuses them."""
    try:
        made = tokenizer.apply_chat_template(
            copy.deepcopy(list(messages)),
            tools=tools,
            chat_template=twin,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:  # noqa: BLE001 - templates raise what they like
        return None
    spans = spans_of(made["input_ids"], made["assistant_masks"], stop_ids)
    return [tokenizer.decode(span) for span in spans]


def explain(
    ours: Sequence[str], theirs: Sequence[str], stops: Sequence[str], *, asks: str, only_last: bool
) -> set[str]:
    """Return the kinds of difference between trained texts, or a sentence for one that has no explanation.

    Args:
        ours: Trained texts.
        theirs: Those of the twin.
        stops: Texts of stop tokens.
        asks: What the template puts behind the conversation to ask for an answer.
        only_last: Whether only the last answer is ours.
    """
    kinds = set[str]()
    joined = _answers(theirs, stops, kinds)
    for one, other in zip_longest(ours, joined[-1:] if only_last else joined, fillvalue=""):
        found = _explain_one(one, other, stops, asks)
        kinds |= found if found is not None else {f"unexplained: {other!r} for {one!r}"}
    return kinds - {Kind.EQUAL} or {Kind.EQUAL}


def _answers(theirs: Sequence[str], stops: Sequence[str], kinds: set[str]) -> list[str]:
    """Return the spans of the twin without those that are nothing but white space or a token."""
    kept: list[str] = []
    for text in theirs:
        if not text.strip():
            kinds.add(Kind.LINE_END)
        elif text.strip() in stops:
            kinds.add(Kind.TOKEN)
        else:
            kept.append(text)
    return kept


def _explain_one(ours: str, theirs: str, stops: Sequence[str], asks: str) -> set[str] | None:
    """Return the fewest kinds that make both alike."""
    changes: tuple[tuple[Kind, Callable[[str], str]], ...] = (
        (Kind.LINE_END, lambda text: text.rstrip() if text.rstrip().endswith(tuple(stops)) else text),
        (Kind.HEADER, lambda text: _without_header(text, asks)),
        (Kind.LEAD, lambda text: _without(_LEADS, text)),
        (Kind.THINKING, lambda text: _without(_THOUGHT, text)),
        (Kind.OTHER_STOP, lambda text: _without_stop(text, stops)),
        (Kind.SPACE, lambda text: "".join(text.split())),
    )
    if ours == theirs:
        return {Kind.EQUAL}
    for count in range(1, len(changes) + 1):
        for chosen in combinations(changes, count):
            one, other = ours, theirs
            for _, change in chosen:
                one, other = change(one), change(other)
            if one == other:
                return {kind for kind, _ in chosen}
    return None


def _without(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.match(text)
    return text[found.end() :] if found else text


def _without_header(text: str, asks: str) -> str:
    """Return ``text`` without the longest of its beginnings that ``asks`` has too, or what opens a thought."""
    same = next(
        (
            size
            for size in range(min(len(text), len(asks)), 3, -1)
            if text[:size] in asks and text[size - 1] != "<"
        ),
        0,
    )
    return _without(_OPENING, _ANSWERS.sub("", text[same:], count=1))


def _without_stop(text: str, stops: Sequence[str]) -> str:
    stop = next((stop for stop in stops if text.endswith(stop)), "")
    return text.removesuffix(stop)
