"""What is proved about every row before it is trained on. Each proof looks at what was made, not at how.

P1  the template agrees: its rendering of the real conversation is the text that was tokenized.
P2  generation agrees: what would ask for an answer is exactly what stands before it, as text and as ids.
P3  the span is whole: the trained ids of a turn read as its text and end in a token at which generation stops.
    Of an answer that is cut for its length: they read as the beginning of its text, and end in no such token.
P4  nothing leaked: no control token stands where a content stands.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sftcli.data.conversations.messages import RejectReason, RowFaultError
from sftcli.data.rendering.segments import CONTEXT_CHARS, first_difference


def text_fault(rendered: str, expected: str) -> RowFaultError:
    """Return why P1 does not hold, from the first place where the two texts differ."""
    same = first_difference(rendered, expected)
    given, made = expected[same : same + CONTEXT_CHARS], rendered[same : same + CONTEXT_CHARS]
    return RowFaultError(
        RejectReason.TEMPLATE_REWRITES, f"the template writes {made!r} where the conversation has {given!r}"
    )


def prove_prompt(prompt: str, text: str, *, turn: int) -> None:
    """P2 as text: ``prompt``, the real rendering that asks for ``turn``, is how the row's ``text`` begins.

    As ids it holds because the row is cut where the prompt ends.

    Raises:
        RowFaultError: It is not.
    """
    if not text.startswith(prompt):
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE,
            f"turn {turn + 1} is asked for by {prompt[-CONTEXT_CHARS:]!r}, which is not what stands before it",
        )


def prove_span(
    ids: Sequence[int],
    decoded: str,
    behind: str,
    *,
    contents: Sequence[str],
    stop_ids: frozenset[int],
    turn: int,
) -> None:
    """P3: the trained ``ids`` of ``turn`` are its contents and its stop token, and nothing is missing or too much.

    Args:
        ids: The trained tokens.
        decoded: How they read.
        behind: The row's text from where generation would start; ``decoded`` is how it begins.
        contents: Stand inside ``decoded`` in this order.
        stop_ids: ``ids`` end in one of them and hold no other.
        turn: For the message, from 0.

    Raises:
        RowFaultError: It is not so.
    """
    if not ids or ids[-1] not in stop_ids:
        raise RowFaultError(
            RejectReason.NO_STOP_TOKEN, f"the trained tokens of turn {turn + 1} end in no stop token"
        )
    if not stop_ids.isdisjoint(ids[:-1]):
        raise RowFaultError(RejectReason.SPAN_UNPROVABLE, f"turn {turn + 1} goes on behind a stop token")
    if not behind.startswith(decoded):
        same = first_difference(decoded, behind)
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE,
            f"the tokens of turn {turn + 1} read {decoded[same : same + CONTEXT_CHARS]!r}"
            f" where its text is {behind[same : same + CONTEXT_CHARS]!r}",
        )
    place = 0
    for content in contents:
        place = decoded.find(content, place)
        if place < 0:
            raise RowFaultError(
                RejectReason.SPAN_UNPROVABLE,
                f"the trained tokens of turn {turn + 1} do not hold its whole content",
            )
        place += len(content)


def prove_cut_span(
    ids: Sequence[int],
    decoded: str,
    behind: str,
    *,
    contents: Sequence[str],
    stop_ids: frozenset[int],
    turn: int,
) -> None:
    """P3 for an answer that is cut: the trained ``ids`` of ``turn`` are how it begins, and do not pretend that it ends.

    Args:
        ids: The trained tokens that are left.
        decoded: How they read.
        behind: The row's text from where generation would start; ``decoded`` is how it begins.
        contents: The whole contents; some of the first one stands in ``decoded``.
        stop_ids: ``ids`` hold none of them.
        turn: For the message, from 0.

    Raises:
        RowFaultError: It is not so.
    """
    if not stop_ids.isdisjoint(ids):
        raise RowFaultError(RejectReason.SPAN_UNPROVABLE, f"turn {turn + 1} is cut and holds a stop token")
    if not behind.startswith(decoded):
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, f"the tokens left of turn {turn + 1} do not read as its beginning"
        )
    if not decoded[find_contents(behind, contents)[0] :].strip():
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, f"nothing is left of the content of turn {turn + 1}"
        )


def find_contents(text: str, contents: Sequence[str]) -> tuple[int, int]:
    """Return where the first of ``contents`` begins in ``text`` and where the last one ends; they stand in it in order."""
    begin = end = 0
    for index, content in enumerate(contents):
        place = text.find(content, end)
        begin, end = place if index == 0 else begin, place + len(content)
    return begin, end


def has_leak(
    ids: npt.NDArray[np.int32], places: npt.NDArray[np.uint8], forbidden: npt.NDArray[np.uint8]
) -> bool:
    """Return whether one of ``ids`` (n,) is at one of ``places`` (n,) for which it is ``forbidden`` (vocabulary,); both are flags.

    The tokens may be those of many rows: where this is false, P4 holds for each of them.
    """
    return bool((places & forbidden[ids]).any())


def prove_no_leak(
    ids: npt.NDArray[np.int32], places: npt.NDArray[np.uint8], forbidden: npt.NDArray[np.uint8]
) -> None:
    """P4 for one row, with what ``has_leak`` takes.

    Raises:
        RowFaultError: It does not hold.
    """
    if has_leak(ids, places, forbidden):
        leak = ids[(places & forbidden[ids]) != 0][0]
        raise RowFaultError(RejectReason.CONTROL_TOKEN, f"a content became the control token with id {leak}")
