"""What a row becomes before any tokenizer sees it: a conversation, a piece of plain text, or a reason why neither.

Import these types from ``conversation``, which makes them; they stand apart so that its helpers can share them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from sftcli.data.reading.json_rows import json_type
from sftcli.data.reading.record import Origin

Role = Literal["system", "user", "assistant", "tool"]

# How rows write roles, in any case; turns of the first kind hold nothing but a tool call.
CALL_ROLES = ("function_call", "tool_call")
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "claude", "gemini", "model"), "assistant"
    ),
    **dict.fromkeys(CALL_ROLES, "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}


def role_of(turn: Mapping[str, object]) -> Role | None:
    """Return the role of a turn as a row has it; None where it has none that is known."""
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. ``content`` is byte for byte what the row holds.

    ``thinking`` comes before it: the reasoning of a row that has it in a field of its own.

    ``tool_calls`` is JSON text of the OpenAI list, empty where the turn makes none. Its ``arguments`` are objects, also
    where the row had them as JSON text: that is what most chat templates expect. ``call_texts`` has these texts for the
    others, one for each call, empty where the row had an object.

    ``without_loss`` are offsets in the content of a trained turn, in pairs: what stands from the first of a pair to the
    second is context.
    """

    role: Role
    content: str
    trained: bool = False
    tool_calls: str = ""
    call_texts: tuple[str, ...] = ()
    thinking: str = ""
    name: str = ""  # of the tool that a tool turn answers for, where the row gives it
    tool_call_id: str = ""  # of the call that a tool turn answers, where the row gives it
    without_loss: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row as messages. ``tools`` is JSON text of the OpenAI tool list, empty where there is none.

    There is at least one trained assistant turn, and the last turn is the assistant's: ``num_cut`` turns that stood
    behind it were cut off, because nothing answers them. ``score`` says how hard it is, where the source does. ``variables`` is
    JSON text of the variables that the row sets for its chat template, empty where it sets none. ``row`` is the hash of what
    its source says, where an answer was replaced since; empty where it is that of the conversation itself.
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: str = ""
    variables: str = ""
    num_cut: int = 0
    score: float | None = None
    row: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainText:
    """A row of running text without turns, for the pretraining share."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A row that came as token ids, with the tokens that are trained; all behind the first where it has no trained turn."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    origin: Origin
    num_trained_turns: int


class RejectReason(StrEnum):
    """Why a row is not trained on. The values are a published interface: the audit counts rows by them."""

    # found by `conversation`
    EMPTY_ANSWER = "empty-answer"
    EMPTY_PROMPT = "empty-prompt"
    EMPTY_TEXT = "empty-text"
    MISSING_FIELD = "missing-field"
    WRONG_TYPE = "wrong-type"
    UNKNOWN_ROLE = "unknown-role"
    ROLE_ORDER = "role-order"
    NOTHING_TRAINED = "nothing-trained"
    LABELED_BAD = "labeled-bad"
    # found by `render`
    TOO_LONG = "too-long"
    TEMPLATE_REFUSED = "template-refused"
    TEMPLATE_REWRITES = "template-rewrites"
    TEMPLATE_DROPS = "template-drops"
    SPAN_UNPROVABLE = "span-unprovable"
    NO_STOP_TOKEN = "no-stop-token"
    CONTROL_TOKEN = "control-token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that is left out. ``detail`` says what was found in it, for a line behind ``origin``.

    ``remedy`` says what to do about it where more is known than what the reason alone tells.
    """

    origin: Origin
    reason: RejectReason
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.detail}"


class RowFault(Exception):  # noqa: N818 - not an error of the program: it becomes a rejected row
    """A row cannot be trained on."""

    def __init__(self, reason: RejectReason, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.remedy = remedy


def wrong_type(name: str, value: object, expected: str = "text") -> RowFault:
    """Return the fault of a value of the wrong type; ``name`` is a column or a turn's key."""
    return RowFault(RejectReason.WRONG_TYPE, f"{name} is {json_type(value)}, expected {expected}")


class RowFaultError(Exception):
    """A row, or every row of a shape, cannot be trained on."""

    def __init__(self, reason: RejectReason, detail: str, *, remedy: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.remedy = remedy

    def rejected(self, origin: Origin) -> Rejected:
        """Return the rejection of the row at ``origin``."""
        return Rejected(origin=origin, reason=self.reason, detail=self.detail, remedy=self.remedy)
