"""Turns of agents, as OpenAI's Responses and Anthropic's Messages write them, to turns of OpenAI's chat.

Responses are lists of items: a message, a call, what it gave, or reasoning, each for itself. What one answer is made of, a text and
the calls behind it, becomes one turn here, with the reasoning in front of it. Anthropic writes calls and results as parts
of a content; each result becomes a turn of its own.
"""

from collections.abc import Iterator, Mapping, Sequence

from sftcli.data.conversations.keys.meaning import is_told
from sftcli.data.conversations.messages import RejectReason, RowFault

Turn = Mapping[str, object]
NumberedTurn = tuple[int, object]
"""The number of a turn in the row, 1-based, and the turn as OpenAI's chat has it."""

ITEM_KEYS = frozenset(
    (
        "type",
        "id",
        "status",
        "call_id",
        "name",
        "arguments",
        "output",
        "summary",
        "content",
        "encrypted_content",
    )
)
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_BLOCKS = ("tool_use", "tool_result")


def is_item(turn: object) -> bool:
    """Return whether a turn is an item of OpenAI's Responses."""
    if not isinstance(turn, dict) or not isinstance(kind := turn.get("type"), str) or "from" in turn:
        return False
    return kind == "message" or "role" not in turn


def chat_turns(turns: Sequence[object]) -> list[NumberedTurn]:
    """Return turns as OpenAI's chat writes them; those that are not of an agent's trace as they are.

    Raises:
        RowFault: A trace holds something else, or the result of a call that is not there.
    """
    if any(map(is_item, turns)):
        made = _of_items(turns)
    elif any(map(_has_blocks, turns)):
        made = [pair for number, turn in enumerate(turns, 1) for pair in _of_blocks(turn, number)]
    else:
        return list(enumerate(turns, 1))
    _check_results(made)
    return made


def _of_items(items: Sequence[object]) -> list[NumberedTurn]:
    """Return the turns of items, what belongs to one answer as one turn."""
    made: list[NumberedTurn] = []
    for number, turn in _thinking_turns(items):
        before = made[-1][1] if made else None
        if _calls(turn) and not _thinks(turn) and _is_answer(before) and _marks(before) == _marks(turn):
            assert isinstance(before, dict)
            before["tool_calls"] = [*_calls(before), *_calls(turn)]
        else:
            made.append((number, turn))
    return made


def _thinking_turns(items: Sequence[object]) -> Iterator[NumberedTurn]:
    """Yield a turn for each item, reasoning with the answer that it is in front of."""
    thoughts: list[object] = []
    for number, item in enumerate(items, 1):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind not in _ITEMS:
            raise RowFault(
                RejectReason.WRONG_TYPE, f"turn {number} is an item of type {kind!r}, which is not read"
            )
        if kind == "reasoning":
            assert isinstance(item, dict)
            thoughts += _reasoning(item, number)
            continue
        turn = _plain_turn(item, kind)
        if thoughts and isinstance(turn, dict):
            if not _is_answer(turn):
                raise RowFault(
                    RejectReason.WRONG_TYPE, f"turn {number} follows reasoning, and is not the assistant's"
                )
            turn["reasoning_content"], thoughts = thoughts, []
        yield number, turn
    if thoughts:
        raise RowFault(RejectReason.WRONG_TYPE, f"turn {len(items)} is reasoning, and no answer follows it")


def _is_answer(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant"


def _plain_turn(item: object, kind: str) -> object:
    """Return an item that is not reasoning as a turn."""
    if not isinstance(item, dict):
        return item  # which is refused where turns are read
    if kind == "message":
        return {key: value for key, value in item.items() if key not in ("type", "id", "status")}
    rest = {key: value for key, value in item.items() if key not in ITEM_KEYS}
    if kind == "function_call_output":
        return {**rest, "role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    call = _call(item.get("call_id"), item.get("name"), item.get("arguments"))
    return {**rest, "role": "assistant", "content": "", "tool_calls": [call]}


def _call(call_id: object, name: object, arguments: object) -> dict[str, object]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def _calls(turn: object) -> list[object]:
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    return calls if isinstance(calls, list) else []


def _thinks(turn: object) -> bool:
    return isinstance(turn, dict) and "reasoning_content" in turn


def _marks(turn: object) -> dict[str, object]:
    """Return what is said about a turn beside its texts."""
    assert isinstance(turn, dict)
    texts = ("content", "tool_calls", "reasoning_content", "phase")
    return {key: value for key, value in turn.items() if key not in texts}


def _reasoning(item: Turn, number: int) -> list[object]:
    """Return the texts of an item of reasoning: the reasoning itself, or else its summary."""
    for key in ("content", "summary"):
        if is_told(item.get(key)):
            value = item[key]
            return value if isinstance(value, list) else [value]
    if is_told(item.get("encrypted_content")):
        raise RowFault(RejectReason.WRONG_TYPE, f"turn {number} holds thinking without a text")
    return []


def _parts_of(turn: object) -> list[object]:
    content = turn.get("content") if isinstance(turn, dict) else None
    return content if isinstance(content, list) else []


def _is_block(part: object, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind


def _has_blocks(turn: object) -> bool:
    return any(_is_block(part, kind) for part in _parts_of(turn) for kind in _BLOCKS)


def _of_blocks(turn: object, number: int) -> Iterator[NumberedTurn]:
    if not isinstance(turn, dict) or not _has_blocks(turn):
        yield number, turn
        return
    kind = "tool_use" if turn.get("role") == "assistant" else "tool_result"
    blocks = [part for part in _parts_of(turn) if _is_block(part, kind)]
    others = [part for part in _parts_of(turn) if not _is_block(part, kind)]
    if kind == "tool_use":
        if blocks and _parts_of(turn) != [*others, *blocks]:
            raise RowFault(RejectReason.WRONG_TYPE, f"turn {number}: a text stands behind a call")
        calls = [
            _call(block.get("id"), block.get("name"), block.get("input"))
            for block in blocks
            if isinstance(block, dict)
        ]
        yield number, {**turn, "content": others, **({"tool_calls": calls} if calls else {})}
        return
    if _parts_of(turn) != [*blocks, *others]:
        raise RowFault(RejectReason.WRONG_TYPE, f"turn {number}: the result of a call stands behind a text")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    for block in blocks:
        assert isinstance(block, dict)
        content = block.get("content")
        result = {"tool_call_id": block.get("tool_use_id"), "content": "" if content is None else content}
        yield number, {**rest, "role": "tool", **result}
    if others:
        yield number, {**turn, "content": others}


def _check_results(turns: Sequence[NumberedTurn]) -> None:
    """See that each result is that of a call before it."""
    called = set[str]()
    for number, turn in turns:
        if not isinstance(turn, dict):
            continue
        called.update(str(call.get("id")) for call in _calls(turn) if isinstance(call, dict))
        if turn.get("role") == "tool" and str(turn.get("tool_call_id")) not in called:
            raise RowFault(
                RejectReason.WRONG_TYPE,
                f"turn {number} is the result of the call {turn.get('tool_call_id')!r}, which no turn before it makes",
            )
