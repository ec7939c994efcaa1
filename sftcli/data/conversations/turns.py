"""Turns as rows write them, OpenAI or ShareGPT, to messages: role names, content parts, tool calls, transcripts.

Roles (any case)                                                      become
  system, developer                                                   system
  user, human, prompter                                               user
  assistant, gpt, chatgpt, bard, bing, bot, claude, gemini, model     assistant
  function_call, tool_call                                            assistant, with the content as its tool call
  tool, function, observation, function_response, tool_response       tool

Order of turns: a system turn only at the start; then the user first, unless the settings say otherwise; a tool's turn behind an assistant's or another
tool's. Neighbouring turns of the assistant that call tools are one turn, which is how a model calls several tools at once; other
turns of one role in a row are left to the chat template. What stands behind the last assistant turn is cut. An assistant turn
with a mark that is false or 0 (`weight`, `train`, `loss` and their like) is not trained, and so is a part of its content.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sftcli.config.schema.data import RENDERING_NAMES, FirstTurn, TrainOn
from sftcli.data.conversations.formats import TOOL_COLUMNS, VARIABLES_COLUMN
from sftcli.data.conversations.keys.key_checks import (
    check_part,
    check_thinking_part,
    check_turn,
    is_untrained,
)
from sftcli.data.conversations.keys.meaning import THINKING, UnreadError, is_told
from sftcli.data.conversations.messages import (
    CALL_ROLES,
    ROLES,
    Conversation,
    Message,
    RejectReason,
    Role,
    RowFault,
    role_of,
    wrong_type,
)
from sftcli.data.conversations.remedies import FIRST_TURN
from sftcli.data.conversations.thinking import is_thinking_part, part_text, read_thinking
from sftcli.data.conversations.traces import chat_turns
from sftcli.data.reading.json_rows import decode_inner, json_type
from sftcli.data.reading.record import Origin
from sftcli.suggest import did_you_mean

MAX_TURNS = 10_000  # of a row; each answer can become a row of its own, with all turns before it
_TOOL_KEYS = ("type", "cache_control")  # of a tool that is written without a `function`
_FUNCTION_KEYS = {"input_schema": "parameters"}  # as Anthropic calls it
_NULL_MEANS = ("default", "const", "example")  # in the JSON schema of a tool


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of a turn: JSON text of OpenAI's list, arguments as objects, and the arguments as the row writes them.

    ``texts`` has an entry for each call, empty where the row has an object.
    """

    dump: str = ""
    texts: tuple[str, ...] = ()


def read_calls(value: object, where: str) -> Calls:
    """Return one tool call or a list of them.

    Raises:
        RowFault: One is not a call, or its arguments are no JSON object.
    """
    calls = value if isinstance(value, list) else [value]
    read = [_call(call, f"{where}: call {number}") for number, call in enumerate(calls, 1)]
    return Calls(_dump([call for call, _ in read]), tuple(text for _, text in read))


def _call(call: object, where: str) -> tuple[dict[str, object], str]:
    """Return one call in OpenAI's form with its arguments as an object, and as the row writes them."""
    if not isinstance(call, dict):
        raise wrong_type(where, call, "an object")
    outer = _without_nulls(call)
    function = outer.get("function", outer)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(RejectReason.WRONG_TYPE, f"{where} has no name")
    function = _without_nulls(function)
    text = ""
    if "arguments" in function:
        arguments, text = _arguments(function["arguments"], f"{where} ({function['name']})")
        function["arguments"] = arguments
    return {"type": "function", **(outer if "function" in outer else {}), "function": function}, text


def _arguments(value: object, where: str) -> tuple[dict[str, object], str]:
    text = value if isinstance(value, str) else ""
    if isinstance(value, str):
        try:
            value = decode_inner(value)
        except ValueError as error:
            shown = f"{text[:20]!r}{'...' if len(text) > 20 else ''}"
            raise RowFault(RejectReason.WRONG_TYPE, f"{where}: the arguments are {error}: {shown}") from None
    if not isinstance(value, dict):
        what = f"JSON text of {json_type(value)}" if text else json_type(value)
        raise RowFault(RejectReason.WRONG_TYPE, f"{where}: the arguments are {what}, expected an object")
    return value, text


def _without_nulls(fields: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in fields.items() if value is not None}


def joined(first: Calls, second: Calls) -> Calls:
    """Return the calls of both in one list."""
    return Calls(f"{first.dump[:-1]},{second.dump[1:]}", first.texts + second.texts)


def tool_list(fields: Mapping[str, object]) -> str:
    """Return the tools of a row as JSON text of OpenAI's list, empty when there are none.

    Raises:
        RowFault: They are not a list of tools.
    """
    if fields.keys().isdisjoint(TOOL_COLUMNS):  # nearly always
        return ""
    column = next((column for column in TOOL_COLUMNS if fields.get(column)), "")
    if not column:
        return ""
    value = fields[column]
    tools = json_in(value, f'"{column}"') if isinstance(value, str) and value.strip() else value
    if not isinstance(tools, list):
        raise wrong_type(f'"{column}"', tools, "a list of tools")
    return _dump([_without_filled(_tool(tool, column)) for tool in tools]) if tools else ""


def template_variables(fields: Mapping[str, object]) -> str:
    """Return what a row sets for its chat template as JSON text of an object, empty where it sets nothing.

    Raises:
        RowFault: It is no object of plain values.
    """
    if not is_told(fields.get(VARIABLES_COLUMN)):
        return ""
    value = json_in(fields[VARIABLES_COLUMN], f'"{VARIABLES_COLUMN}"')
    if not isinstance(value, dict):
        raise wrong_type(f'"{VARIABLES_COLUMN}"', value, "an object")
    for name, inner in value.items():
        if isinstance(inner, list | dict) or not name.isidentifier() or name in RENDERING_NAMES:
            raise RowFault(
                RejectReason.WRONG_TYPE, f'"{VARIABLES_COLUMN}" sets {name!r}, which is no plain variable'
            )
    return _dump(_without_nulls(value))


def _tool(tool: object, column: str) -> dict[str, object]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        function = {
            _FUNCTION_KEYS.get(key, key): value for key, value in tool.items() if key not in _TOOL_KEYS
        }
        return {"type": "function", "function": function}
    raise RowFault(RejectReason.WRONG_TYPE, f'"{column}" holds something that is not a tool with a name')


def _without_filled(value: object) -> object:
    """Return a tool without the nulls in whose place a table, or a program's own class, had nothing to write."""
    if isinstance(value, list):
        return [_without_filled(item) for item in value]
    if isinstance(value, dict):
        return {
            key: _without_filled(item)
            for key, item in value.items()
            if item is not None or key in _NULL_MEANS
        }
    return value


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_in(value: object, where: str) -> object:
    """Return what a JSON text holds; anything that is not text as it is."""
    try:
        return decode_inner(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowFault(RejectReason.WRONG_TYPE, f"{where} is {error}") from None


_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read_turns(value: object, column: str) -> list[Message]:
    """Return the messages of a list of turns, or of its JSON text. Assistant turns are marked as trained.

    Raises:
        RowFault: A turn is not one, has no known role or no text.
    """
    if isinstance(value, str):
        value = json_in(value, f'"{column}"')
    if not isinstance(value, list):
        raise wrong_type(f'"{column}"', value, "a list of turns")
    if len(value) > MAX_TURNS:
        raise RowFault(RejectReason.WRONG_TYPE, f"the row has {len(value)} turns; the limit is {MAX_TURNS}")
    return [_read_turn(turn, number) for number, turn in chat_turns(value)]


def turns_or_text(value: object, column: str, role: Role) -> list[Message]:
    """Return the messages of a column that holds a text, one turn, or a list of turns; ``role`` is that of a text."""
    if isinstance(value, str):
        return [Message(role=role, content=value, trained=role == "assistant")]
    if isinstance(value, dict | list):
        return read_turns(value if isinstance(value, list) else [value], column)
    raise wrong_type(f'"{column}"', value)


def is_transcript(value: object) -> bool:
    """Whether a text is a whole dialogue with ``Human:`` and ``Assistant:`` at the start of its turns."""
    return isinstance(value, str) and bool((match := _SPEAKER.match(value)) and match[1] == "Human")


def read_transcript(text: str) -> list[Message]:
    """Return the turns of a transcript. The one space behind a speaker's colon is not part of the turn."""
    _, *pieces = _SPEAKER.split(text)
    return [
        Message(
            role="user" if speaker == "Human" else "assistant",
            content=content.removeprefix(" "),
            trained=speaker == "Assistant",
        )
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _read_turn(turn: object, number: int) -> Message:
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise wrong_type(where, turn, "an object with role and content")
    said = turn.get("role", turn.get("from"))
    if not isinstance(said, str):
        fault = RejectReason.MISSING_FIELD if said is None else RejectReason.WRONG_TYPE
        raise RowFault(fault, f"{where} has no role")
    role = role_of(turn)
    if role is None:
        hint = did_you_mean(said.lower(), ROLES)
        raise RowFault(
            RejectReason.UNKNOWN_ROLE, f"{where}: the role {said!r} is not known{hint and f' ({hint})'}"
        )
    is_answer = role == "assistant"
    check_turn(turn, is_assistant=is_answer)
    calls = Calls()
    if said.lower() in CALL_ROLES:
        calls = read_calls(json_in(turn.get("value", turn.get("content")), f"{where}: the call"), where)
    elif role == "assistant":
        calls = _calls_of(turn, where)
    thinking = read_thinking(turn, f"{where}: ") if is_answer else ""
    said_parts = (
        _Parts("", "") if said.lower() in CALL_ROLES else _content(turn, where, is_call=bool(calls.dump))
    )
    thought, content = said_parts.thought, said_parts.text
    if thought and not is_answer:
        raise UnreadError([THINKING.unread("thinking", " of content parts")])
    if thought and thinking and thought.strip() != thinking.strip():
        raise RowFault(
            RejectReason.WRONG_TYPE, f"{where} holds different thinking in its content and beside it"
        )
    is_trained = is_answer and not is_untrained(turn) and (said_parts.has_loss or bool(calls.dump))
    return Message(
        role=role,
        content=content,
        thinking=thinking or thought,
        trained=is_trained,
        tool_calls=calls.dump,
        call_texts=calls.texts,
        name=_optional(turn, "name") if role == "tool" else "",
        tool_call_id=_optional(turn, "tool_call_id"),
        without_loss=said_parts.without_loss if is_trained else (),
    )


def _optional(turn: Mapping[str, object], key: str) -> str:
    value = turn.get(key)
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class _Parts:
    """A content: the thinking that stands in it as parts, the rest, and which of that has no loss as ``Message`` has it."""

    thought: str
    text: str
    without_loss: tuple[int, ...] = ()

    @property
    def has_loss(self) -> bool:
        """Whether anything but white space has loss, or there is nothing that could lose it."""
        edges = (0, *self.without_loss, len(self.text))
        kept = [self.text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
        return not self.without_loss or any(map(str.strip, kept))


def _content(turn: Mapping[str, object], where: str, *, is_call: bool) -> _Parts:
    key = "content" if "content" in turn else "value"
    value = turn.get(key)
    if isinstance(value, str):
        return _Parts("", value)
    if isinstance(value, list):
        return _parts(value, where, is_answer=role_of(turn) == "assistant")
    if value is not None:
        raise wrong_type(f'{where}: "{key}"', value)
    if is_call:
        return _Parts("", "")
    if key in turn:
        raise wrong_type(f'{where}: "{key}"', None)
    raise RowFault(RejectReason.MISSING_FIELD, f"{where} has no content")


def _parts(parts: Sequence[object], where: str, *, is_answer: bool) -> _Parts:
    thoughts = [part for part in parts if isinstance(part, dict) and is_thinking_part(part)]
    others = [part for part in parts if not is_thinking_part(part)]
    if parts[: len(thoughts)] != thoughts:
        raise RowFault(RejectReason.WRONG_TYPE, f"{where}: a content part of thinking stands behind text")
    for thought in thoughts:
        check_thinking_part(thought)
    texts = [_part(part, where, is_answer=is_answer) for part in others]
    marked = [isinstance(part, dict) and is_untrained(part) for part in others]
    return _Parts(
        thought="\n\n".join(part_text(thought, f"{where}: a content part") for thought in thoughts),
        text="".join(texts),
        without_loss=_stretches(texts, marked),
    )


def _stretches(texts: Sequence[str], marked: Sequence[bool]) -> tuple[int, ...]:
    """Return where the ``marked`` ones among ``texts`` begin and end in all of them; neighbours are one."""
    edges: list[int] = []
    end = 0
    for text, is_marked in zip(texts, marked, strict=True):
        begin, end = end, end + len(text)
        if is_marked and text:
            edges[-1:] = [end] if edges and edges[-1] == begin else [*edges[-1:], begin, end]
    return tuple(edges)


def _part(part: object, where: str, *, is_answer: bool) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        check_part(part, is_assistant=is_answer)
    kind = part.get("type", "text") if isinstance(part, dict) else json_type(part)
    text = part.get("text", part.get("value")) if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise RowFault(RejectReason.WRONG_TYPE, f"{where}: a content part is {kind}, expected text")
    return text


def _calls_of(turn: Mapping[str, object], where: str) -> Calls:
    if calls := turn.get("tool_calls"):
        return read_calls(json_in(calls, f"{where}: the list of calls"), where)
    if call := turn.get("function_call"):
        return read_calls(call, where)
    return Calls()


def build_conversation(
    turns: Sequence[Message],
    *,
    system: str,
    tools: str,
    variables: str,
    origin: Origin,
    train_on: TrainOn,
    first_turn: FirstTurn = FirstTurn.REJECT,
) -> Conversation:
    """Return the conversation of ``turns`` under ``system`` (none when empty), checked and cut behind its last answer.

    Raises:
        RowFault: A turn is empty or out of place, or nothing would be trained.
    """
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise RowFault(
            RejectReason.ROLE_ORDER, "no turn is the assistant's" if turns else "there are no turns"
        )
    kept = list(turns[: last + 1])
    for index, turn in enumerate(kept):
        _check_place(kept, index, has_system=bool(system), first_turn=first_turn)
        _check_not_empty(turn, index + 1)
    kept = _with_tool_names(_with_calls_joined(kept))
    if first_turn is FirstTurn.UNTRAINED:
        kept = _with_beginning_untrained(kept)
    if train_on is TrainOn.LAST:
        kept[:-1] = [replace(turn, trained=False) if turn.trained else turn for turn in kept[:-1]]
    if not any(turn.trained for turn in kept):
        raise RowFault(RejectReason.NOTHING_TRAINED, "every assistant turn is marked as not trained")
    if system:
        kept.insert(0, Message(role="system", content=system))
    return Conversation(
        messages=tuple(kept), origin=origin, tools=tools, variables=variables, num_cut=len(turns) - last - 1
    )


def _with_calls_joined(turns: Sequence[Message]) -> list[Message]:
    """Return ``turns`` with neighbouring ones that do nothing but call tools as one, as a model makes several calls."""
    made: list[Message] = []
    for turn in turns:
        before = made[-1] if made else None
        if before and before.tool_calls and turn.tool_calls and _only_adds_calls(turn, before):
            calls = joined(
                Calls(before.tool_calls, before.call_texts), Calls(turn.tool_calls, turn.call_texts)
            )
            made[-1] = replace(before, tool_calls=calls.dump, call_texts=calls.texts)
        else:
            made.append(turn)
    return made


def _with_beginning_untrained(turns: list[Message]) -> list[Message]:
    """Return ``turns`` with no loss on those of the assistant in front of the first question."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return [replace(turn, trained=False) for turn in turns[:first]] + turns[first:]


def _with_tool_names(turns: list[Message]) -> list[Message]:
    """Return ``turns`` with the name of the tool in each result that names its call by the id alone."""
    if not any(turn.tool_call_id and not turn.name for turn in turns):  # nearly always
        return turns
    names = dict[str, str]()
    made = []
    for turn in turns:
        if turn.tool_calls:
            names |= {str(call.get("id")): call["function"]["name"] for call in json.loads(turn.tool_calls)}
        is_nameless = turn.role == "tool" and turn.tool_call_id and not turn.name
        made.append(replace(turn, name=names.get(turn.tool_call_id, "")) if is_nameless else turn)
    return made


def _only_adds_calls(turn: Message, before: Message) -> bool:
    return not turn.content.strip() and not turn.thinking and turn.trained == before.trained


def _check_place(turns: Sequence[Message], index: int, *, has_system: bool, first_turn: FirstTurn) -> None:
    role, before = turns[index].role, turns[index - 1].role if index else None
    number = index + 1
    if role == "system" and (index or has_system):
        what = "stands behind other turns" if index else "comes on top of the system text in a column"
        raise RowFault(RejectReason.ROLE_ORDER, f"turn {number}: a system turn {what}")
    is_first = before in (None, "system")
    if is_first and (role == "tool" or (role == "assistant" and first_turn is FirstTurn.REJECT)):
        detail = f"turn {number} is of role {role}, expected the user first"
        can_be_kept = role == "assistant" and any(turn.role == "user" for turn in turns)
        raise RowFault(RejectReason.ROLE_ORDER, detail, FIRST_TURN if can_be_kept else "")
    if role == "tool" and before == "user":
        raise RowFault(
            RejectReason.ROLE_ORDER, f"turn {number}: a tool turn follows the user, who made no call"
        )


def _check_not_empty(turn: Message, number: int) -> None:
    if turn.role == "user" and not turn.content.strip():
        raise RowFault(RejectReason.EMPTY_PROMPT, f"turn {number}: the user's text is {_seen(turn.content)}")
    if turn.role == "assistant" and not turn.tool_calls and not turn.content.strip():
        raise RowFault(RejectReason.EMPTY_ANSWER, f"turn {number}: the answer is {_seen(turn.content)}")


def _seen(content: str) -> str:
    return f"blank: {content[:20]!r}" if content else "empty"
