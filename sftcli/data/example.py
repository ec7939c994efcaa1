"""A row as tokens, and what was noticed about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from sftcli.data.conversations.messages import Rejected
from sftcli.data.reading.record import Origin

Kind = Literal["conversation", "text"]


class RowFlag(StrEnum):
    """What was noticed about a row that is kept. The values are a published interface: the audit counts rows by them."""

    CONTROL_TEXT = "control-text"  # a content holds the text of a control token; it stays text
    CONTROL_WRITTEN = "control-written"  # a content wrote a control token, as the settings allow
    STOP_TEXT = "stop-text"  # an answer ends in the text of a stop token; it is trained as text
    STOP_STRIPPED = "stop-stripped"  # it did, and the settings have it taken away
    STRIPPED = "stripped"  # the template takes white space from the ends of contents; so it is trained
    NORMALIZED = "normalized"  # the tokenizer brings answers to a Unicode normal form; so it is trained
    THINKING = "thinking"  # an answer thinks first
    THOUGHT_DROPPED = "thought-dropped"  # the template leaves the thinking out of a turn that is not trained
    THOUGHT_SPACED = (
        "thought-spaced"  # the template sets its own white space around thinking; so it is trained
    )
    THOUGHT_WRITTEN = (
        "thought-written"  # the template knows of no thinking; it stands in the answer, between tags
    )
    PROMPT_JOINED = "prompt-joined"  # the template asks for an answer otherwise than it shows one; it stands behind what asks for it
    SPLIT_TURNS = "split-turns"  # one of several answers of a row, in an example of its own
    SPLIT_TEXT = "split-text"  # a piece of a text that is longer than a row
    TOOLS_DROPPED = "tools-dropped"  # the row lists tools, and the template does not show them
    LEAD_TRAINED = (
        "lead-trained"  # the template writes something between the prompt and an answer; it is trained
    )
    STOP_APPENDED = (
        "stop-appended"  # the template ends the last answer with no control token; one was put there
    )
    TRAILING_TURNS = "trailing-turns"  # turns behind the last answer are left out: nothing answers them
    UNREADABLE = "unreadable"  # a content holds U+FFFD: something before this program could not read it
    MISREAD = "misread"  # a content reads like UTF-8 taken for Latin-1 or Windows-1252
    CONTROL_CHARACTER = "control-character"  # a content holds control characters other than tab and line ends
    CUT_TURNS = "cut-turns"  # whole turns at the end are left out
    CUT_ANSWER = "cut-answer"  # the end of an answer is left out, and its stop token
    CUT_STOP = "cut-stop"  # an answer is whole, but its stop token is left out
    CUT_END = "cut-end"  # nothing but the template's text behind the last answer is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row as the model sees it: ``input_ids`` (n,) int32 and ``loss_mask`` (n,) bool, true where there is loss.

    Of kind ``text`` it is a piece of pretraining text, and every token behind its first has loss. ``num_cut`` tokens were left
    out at the end for the row's length. ``num_trained_turns``, 0 for text, and ``num_cut`` are known only as long as the
    example was not stored.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    origin: Origin
    kind: Kind = "conversation"
    num_trained_turns: int = 0
    num_cut: int = 0
    thinking_tokens: int = 0  # of those with loss; known only as long as the example was not stored
    flags: frozenset[RowFlag] = frozenset()
    score: float | None = None  # what the row was told to be by its source
    row: str = ""  # the hash of what its source says, by which fixes name it; running text has none


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLong(Rejected):
    """A row with more tokens than are allowed."""

    num_tokens: int


CUT_ANSWERS = frozenset({RowFlag.CUT_ANSWER, RowFlag.CUT_STOP})  # the last answer does not end
CUTS = CUT_ANSWERS | {RowFlag.CUT_TURNS, RowFlag.CUT_END}
PARTS = frozenset({RowFlag.SPLIT_TURNS, RowFlag.CUT_TURNS})  # not all trained answers of the row are in it
TROUBLES = frozenset({RowFlag.UNREADABLE, RowFlag.MISREAD, RowFlag.CONTROL_CHARACTER})
