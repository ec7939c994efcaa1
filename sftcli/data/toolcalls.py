"""Tools and tool calls, as OpenAI, ShareGPT and older rows write them, to the JSON text of OpenAI's lists.

Keys keep their order and numbers their value, because a chat template writes them out.
"""

import json
from collections.abc import Mapping

from sftcli.data.formats import TOOL_COLUMNS
from sftcli.data.messages import RejectReason, RowFault, wrong_type


def dump_calls(value: object, where: str) -> str:
    """Return one tool call or a list of them as JSON text of OpenAI's list.

    Raises:
        RowFault: One is not a call.
    """
    calls = value if isinstance(value, list) else [value]
    return _dump([_call(call, where) for call in calls])


def _call(call: object, where: str) -> dict[str, object]:
    """Return one call in OpenAI's form, with its arguments as an object where they are JSON text of one."""
    if not isinstance(call, dict):
        raise wrong_type(f"{where}: a tool call", call, "an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(RejectReason.WRONG_TYPE, f"{where}: a tool call has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
    outer = {"type": "function", **(call if "function" in call else {})}
    return {**outer, "function": function}


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
    return _dump([_tool(tool, column) for tool in tools]) if tools else ""


def _tool(tool: object, column: str) -> dict[str, object]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        return {"type": "function", "function": tool}
    raise RowFault(RejectReason.WRONG_TYPE, f'"{column}" holds something that is not a tool with a name')


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_in(value: object, where: str) -> object:
    """Return what a JSON text holds; anything that is not text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowFault(RejectReason.WRONG_TYPE, f"{where} is text that is not JSON") from None
