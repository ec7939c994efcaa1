"""A conversation taken apart: what a person wrote, and the shape that holds it.

Rows of one shape differ in nothing but their texts, so what is found out about the shape is found out once.
A text is a slot of its shape: a content, the thinking inside one, or a string inside a tool call.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache
from itertools import chain, pairwise, repeat

from sftcli.config.schema.data import Thinking
from sftcli.data.conversations.messages import Conversation, Message, RejectReason, Role, RowFaultError

# An answer that thinks first. White space around the tags belongs to the shape, because templates write their own.
_THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_CLOSED_THOUGHT = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_OPENING, CLOSING = "<think>\n", "\n</think>\n\n"
# Under which of these a template takes the thinking of a turn, the commonest first.
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PLACE = "\U000f0002"  # stands for a slot inside the JSON of tool calls


class CallForm(Enum):
    """How a template wants the arguments of tool calls."""

    OBJECT = auto()
    TEXT = auto()  # of JSON


@dataclass(frozen=True, slots=True)
class Form:
    """How a template is handed a row. ``thinking_key`` is "" where thinking stands in the content, between tags."""

    calls: CallForm = CallForm.OBJECT
    thinking_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one text goes. ``turn`` counts from 0. Of a trained turn, thinking may have no loss."""

    turn: int
    role: Role
    trained: bool
    is_argument: bool = False  # inside a tool call, where templates may write it as JSON
    is_thought: bool = False
    has_loss: bool = False


class Piece(Enum):
    """A slot in a content."""

    THOUGHT = auto()
    ANSWER = auto()
    CONTEXT = auto()  # a part of an answer that has no loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnShape:
    """A message without its texts: a ``Piece``, and ``_PLACE`` in ``tool_calls``, stand for slots."""

    role: Role
    trained: bool
    content: tuple[str | Piece, ...]
    thinking_key: str
    tool_calls: str
    num_arguments: int
    name: str
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class ConversationShape:
    """A conversation without its texts."""

    turns: tuple[TurnShape, ...]
    tools: str
    variables: str = ""

    def slots(self, thinking: Thinking = Thinking.TRAIN) -> tuple[Slot, ...]:
        """Return the slots in the order of their texts; ``thinking`` says whether thinking has loss."""
        slots: list[Slot] = []
        for index, turn in enumerate(self.turns):
            content = Slot(turn=index, role=turn.role, trained=turn.trained, has_loss=turn.trained)
            thought = replace(content, is_thought=True, has_loss=turn.trained and thinking is Thinking.TRAIN)
            context = replace(content, has_loss=False)
            kinds = {Piece.THOUGHT: thought, Piece.ANSWER: content, Piece.CONTEXT: context}
            slots += [thought] if turn.thinking_key else []
            slots += [kinds[part] for part in turn.content if isinstance(part, Piece)]
            slots += [replace(content, is_argument=True)] * turn.num_arguments
        return tuple(slots)

    def literals(self) -> Iterator[str]:
        """Return what came from the row and is no slot: names, ids, keys, variables and the tool list."""
        yield self.tools
        yield self.variables
        for turn in self.turns:
            yield from (turn.tool_calls, turn.name, turn.tool_call_id)

    @property
    def calls_tools(self) -> bool:
        """Whether a turn calls tools."""
        return any(turn.tool_calls for turn in self.turns)

    def tool_list(self) -> list[object] | None:
        """Return the tools as the template wants them."""
        return list(json.loads(self.tools)) if self.tools else None

    def variable_values(self) -> dict[str, object]:
        """Return what the row sets for the template."""
        values: dict[str, object] = json.loads(self.variables) if self.variables else {}
        return values

    def messages(self, texts: Sequence[str]) -> list[dict[str, object]]:
        """Return the messages for the template with ``texts`` in the slots."""
        source = iter(texts)
        return [_message(turn, source) for turn in self.turns]


def take_apart(
    conversation: Conversation, *, thinks: bool, form: Form, thinking: Thinking = Thinking.TRAIN
) -> tuple[ConversationShape, list[str]]:
    """Return the shape of ``conversation`` and its texts.

    Args:
        conversation: A row.
        thinks: Whether the template knows ``</think>``, so that it may take thinking out of a content.
        form: In which the template is handed the row.
        thinking: Whether there is any: with ``drop`` there is none.

    Raises:
        RowFaultError: A part of a content without loss reaches into the thinking.
    """
    texts: list[str] = []
    turns = tuple(
        [
            _turn_shape(message, texts, thinks=thinks, form=form, drops=thinking is Thinking.DROP)
            for message in conversation.messages
        ]
    )
    return ConversationShape(turns, conversation.tools, conversation.variables), texts


def find_thinking(message: Message, *, thinks: bool) -> tuple[str, str, str, str] | None:
    """Return the thinking of an answer with what opens and closes it and what follows it; None where it has none.

    A content that closes a thought and opens none begins inside one, for a template that knows such tags (``thinks``).
    """
    if message.role != "assistant":
        return None
    if message.thinking:
        return _OPENING, message.thinking, CLOSING, message.content
    if "</think>" not in message.content:
        return None
    found = (_CLOSED_THOUGHT if thinks else _THOUGHT).fullmatch(message.content)
    if found is None:
        return None
    opening, thought, closing, answer = found.groups()
    return opening, thought, closing, answer


def arguments_of(message: Mapping[str, object]) -> list[object]:
    """Return the arguments of each call of a message as `ConversationShape.messages` makes them."""
    calls = message.get("tool_calls", ())
    assert isinstance(calls, list | tuple)  # as they were made
    return [call["function"].get("arguments") for call in calls]


def _turn_shape(message: Message, texts: list[str], *, thinks: bool, form: Form, drops: bool) -> TurnShape:
    key, content = _content_shape(message, texts, thinks=thinks, key=form.thinking_key, drops=drops)
    if not (message.tool_calls or message.name or message.tool_call_id):
        return _plain_turn(message.role, message.trained, content, key)
    before, calls = len(texts), ""
    if message.tool_calls:
        made = _calls_as_text(message) if form.calls is CallForm.TEXT else json.loads(message.tool_calls)
        lifted = _replace_strings(made, lambda text: _lift(text, texts))
        calls = json.dumps(lifted, ensure_ascii=False)
    return TurnShape(
        role=message.role,
        trained=message.trained,
        content=content,
        thinking_key=key,
        tool_calls=calls,
        num_arguments=len(texts) - before,
        name=message.name,
        tool_call_id=message.tool_call_id,
    )


@lru_cache(maxsize=256)
def _plain_turn(role: Role, trained: bool, content: tuple[str | Piece, ...], key: str) -> TurnShape:
    return TurnShape(
        role=role,
        trained=trained,
        content=content,
        thinking_key=key,
        tool_calls="",
        num_arguments=0,
        name="",
        tool_call_id="",
    )


def _content_shape(
    message: Message, texts: list[str], *, thinks: bool, key: str, drops: bool
) -> tuple[str, tuple[str | Piece, ...]]:
    """Return the key that has the thinking, "" for none, and the content; the texts of both go to ``texts``.

    Raises:
        RowFaultError: A part of the content without loss reaches into the thinking.
    """
    found = find_thinking(message, thinks=thinks)
    if found is None:
        return "", _pieces(message, message.content, texts)
    opening, thought, closing, answer = found
    if drops:
        return "", _pieces(message, answer, texts)
    if key and thought:
        texts.append(thought)
        return key, _pieces(message, answer, texts)
    thought = thought.strip()
    texts += [thought] if thought else []
    pieces = _pieces(message, answer, texts) if answer else ()
    return "", (opening, *((Piece.THOUGHT,) if thought else ()), closing, *pieces)


def _pieces(message: Message, answer: str, texts: list[str]) -> tuple[str | Piece, ...]:
    """Return the slots of ``answer``, the end of the content of ``message``: one, or one for each part with loss or without."""
    if not answer:
        return ("",)
    if not (message.trained and message.without_loss):
        texts.append(answer)
        return (Piece.ANSWER,)
    start = len(message.content) - len(answer)
    if message.without_loss[0] < start:
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, "a part of a content without loss reaches into the thinking"
        )
    edges = [0, *(edge - start for edge in message.without_loss), len(answer)]
    pieces: list[Piece] = []
    for number, (begin, end) in enumerate(pairwise(edges)):
        if begin < end:
            pieces.append(Piece.CONTEXT if number % 2 else Piece.ANSWER)
            texts.append(answer[begin:end])
    return tuple(pieces)


def _calls_as_text(message: Message) -> list[object]:
    """Return calls with their arguments as JSON text: the row's own, else as `json.dumps` writes the object."""
    made = []
    texts = chain(message.call_texts, repeat(""))
    for call, text in zip(json.loads(message.tool_calls), texts, strict=False):
        function = call["function"]
        if "arguments" in function:
            written = text or json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": written}}
        made.append(call)
    return made


def _lift(text: str, texts: list[str]) -> str:
    texts.append(text)
    return _PLACE


def _replace_strings(calls: object, replace: Callable[[str], str]) -> object:
    """Return tool calls with every name and every string inside the arguments replaced, in order."""
    if not isinstance(calls, list):
        return calls
    return [_replace_in_call(call, replace) for call in calls]


def _replace_in_call(call: object, replace: Callable[[str], str]) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _replace_in_call(function, replace)}
    changed = dict(call)
    if isinstance(call.get("name"), str):
        changed["name"] = replace(call["name"])
    if "arguments" in call:
        changed["arguments"] = _replace_leaves(call["arguments"], replace)
    return changed


def _replace_leaves(value: object, replace: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return replace(value) if value else value
    if isinstance(value, list):
        return [_replace_leaves(item, replace) for item in value]
    if isinstance(value, dict):
        return {key: _replace_leaves(item, replace) for key, item in value.items()}
    return value


def _message(turn: TurnShape, texts: Iterator[str]) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role}
    if turn.thinking_key:
        message[turn.thinking_key] = next(texts)
    message["content"] = "".join([next(texts) if isinstance(part, Piece) else part for part in turn.content])
    if turn.tool_calls:
        calls = json.loads(turn.tool_calls)
        message["tool_calls"] = _replace_strings(calls, lambda _place: next(texts))
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message
