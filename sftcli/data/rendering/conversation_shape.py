"""A conversation taken apart: what a person wrote, and the shape that holds it.

Rows of one shape differ in nothing but their texts, so what is found out about the shape is found out once.
A text is a slot of its shape: a content, the thinking inside one, or a string inside a tool call.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import chain, repeat

from sftcli.data.conversations.messages import Conversation, Message, Role

# An answer that thinks first. White space around the tags belongs to the shape, because templates write their own.
_THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_PLACE = "\U000f0002"  # stands for a slot inside the JSON of tool calls


class CallForm(Enum):
    """How a template wants the arguments of tool calls."""

    OBJECT = auto()
    TEXT = auto()  # of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one text goes. ``turn`` counts from 0."""

    turn: int
    role: Role
    trained: bool
    is_argument: bool = False  # inside a tool call, where templates may write it as JSON
    is_thought: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnShape:
    """A message without its texts: None, and ``_PLACE`` in ``tool_calls``, stand for slots."""

    role: Role
    trained: bool
    content: tuple[str | None, ...]
    tool_calls: str
    num_arguments: int
    name: str
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class ConversationShape:
    """A conversation without its texts."""

    turns: tuple[TurnShape, ...]
    tools: str

    def slots(self) -> tuple[Slot, ...]:
        """Return the slots in the order of their texts."""
        slots: list[Slot] = []
        for index, turn in enumerate(self.turns):
            count = turn.content.count(None)
            for number in range(count):
                thought = number < count - 1 or turn.content[-1] is not None
                slots.append(Slot(turn=index, role=turn.role, trained=turn.trained, is_thought=thought))
            argument = Slot(turn=index, role=turn.role, trained=turn.trained, is_argument=True)
            slots += [argument] * turn.num_arguments
        return tuple(slots)

    def literals(self) -> Iterator[str]:
        """Return what came from the row and is no slot: names, ids, keys and the tool list."""
        yield self.tools
        for turn in self.turns:
            yield from (turn.tool_calls, turn.name, turn.tool_call_id)

    @property
    def calls_tools(self) -> bool:
        """Whether a turn calls tools."""
        return any(turn.tool_calls for turn in self.turns)

    def tool_list(self) -> list[object] | None:
        """Return the tools as the template wants them."""
        return list(json.loads(self.tools)) if self.tools else None

    def messages(self, texts: Sequence[str]) -> list[dict[str, object]]:
        """Return the messages for the template with ``texts`` in the slots."""
        source = iter(texts)
        return [_message(turn, source) for turn in self.turns]


def take_apart(
    conversation: Conversation, *, thinks: bool, form: CallForm = CallForm.OBJECT
) -> tuple[ConversationShape, list[str]]:
    """Return the shape of ``conversation`` and its texts.

    Args:
        conversation: A row.
        thinks: Whether the template knows thinking, so that it may take it out of a content.
        form: Of the arguments in its tool calls.
    """
    texts: list[str] = []
    turns = tuple(
        [_turn_shape(message, texts, thinks=thinks, form=form) for message in conversation.messages]
    )
    return ConversationShape(turns, conversation.tools), texts


def arguments_of(message: Mapping[str, object]) -> list[object]:
    """Return the arguments of each call of a message as `ConversationShape.messages` makes them."""
    calls = message.get("tool_calls", ())
    assert isinstance(calls, list | tuple)  # as they were made
    return [call["function"].get("arguments") for call in calls]


def _turn_shape(message: Message, texts: list[str], *, thinks: bool, form: CallForm) -> TurnShape:
    content = _content_shape(message, texts, thinks=thinks)
    if not (message.tool_calls or message.name or message.tool_call_id):
        return _plain_turn(message.role, message.trained, content)
    before, calls = len(texts), ""
    if message.tool_calls:
        made = _calls_as_text(message) if form is CallForm.TEXT else json.loads(message.tool_calls)
        lifted = _replace_strings(made, lambda text: _lift(text, texts))
        calls = json.dumps(lifted, ensure_ascii=False)
    return TurnShape(
        role=message.role,
        trained=message.trained,
        content=content,
        tool_calls=calls,
        num_arguments=len(texts) - before,
        name=message.name,
        tool_call_id=message.tool_call_id,
    )


@lru_cache(maxsize=256)
def _plain_turn(role: Role, trained: bool, content: tuple[str | None, ...]) -> TurnShape:
    return TurnShape(
        role=role, trained=trained, content=content, tool_calls="", num_arguments=0, name="", tool_call_id=""
    )


def _content_shape(message: Message, texts: list[str], *, thinks: bool) -> tuple[str | None, ...]:
    if not message.content:
        return ("",)
    if thinks and message.role == "assistant" and "</think>" in message.content:
        found = _THOUGHT.fullmatch(message.content)
        if found is not None:
            opening, thought, closing, answer = found.groups()
            texts += [text for text in (thought, answer) if text]
            return (opening, *((None,) if thought else ()), closing, *((None,) if answer else ()))
    texts.append(message.content)
    return (None,)


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
    content = "".join([next(texts) if piece is None else piece for piece in turn.content])
    message: dict[str, object] = {"role": turn.role, "content": content}
    if turn.tool_calls:
        calls = json.loads(turn.tool_calls)
        message["tool_calls"] = _replace_strings(calls, lambda _place: next(texts))
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message
