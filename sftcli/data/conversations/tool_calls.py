"""Tools and tool calls, as OpenAI, ShareGPT and older rows write them, to the JSON text of OpenAI's lists.

Keys keep their order and numbers their value, because a chat template writes them out. A null that stands for an absent
key is left out: in a call outside its arguments, and in a tool wherever its schema gives null no meaning.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sftcli.data.conversations.formats import TOOL_COLUMNS
from sftcli.data.conversations.messages import RejectReason, RowFault, wrong_type
from sftcli.data.reading.json_rows import json_type

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
            value = json.loads(value)
        except (ValueError, RecursionError):
            shown = f"{text[:20]!r}{'...' if len(text) > 20 else ''}"
            raise RowFault(
                RejectReason.WRONG_TYPE, f"{where}: the arguments are text that is not JSON: {shown}"
            ) from None
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


def _tool(tool: object, column: str) -> dict[str, object]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        return {"type": "function", "function": tool}
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
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowFault(RejectReason.WRONG_TYPE, f"{where} is text that is not JSON") from None
