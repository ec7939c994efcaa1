"""Tool calls as models write them into their answers, to names with arguments.

Templates write a call each in its own way, and what a model of one family writes another would not. All that differs is the
markup around three kinds of content, so there is a table for each kind:

JSON             ``{"name": "f", "arguments": {"a": 1}}`` and its sisters, between marks or bare
named JSON       a name in the markup, and the arguments as a JSON object
named texts      a name, and each argument as a text of its own, in which ``1`` may be a number or a text

Besides there are calls in Python, ``[f(a=1)]``.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from sftcli.data.conversations.messages import RowFault
from sftcli.data.conversations.turns import read_calls
from sftcli.services.evaluate.checks.json_values import read_json_value

_NAME = r"[\w.:-]+"
# What stands around JSON.
_MARKED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<tool_call>\s*(?P<json>[\[{].*?)\s*(?:</tool_call>|\Z)",  # Hermes, Qwen
        r"<(?:functioncall|function_call|tool_calls|TOOLCALL)>\s*(?P<json>[\[{].*?)\s*(?:</\w+>|\Z)",  # Glaive, Nemotron
        r"\[TOOL_CALLS\]\s*(?P<json>\[.*)",  # Mistral
        r"<\|python_tag\|>\s*(?P<json>[\[{].*)",  # Llama 3
        r"<\|tool_call\|>\s*(?P<json>[\[{].*?)\s*(?:<\|/tool_call\|>|\Z)",  # Granite, Phi
        r"```(?:json|tool_call|tool_code)?\s*\n(?P<json>\s*[\[{].*?)\n\s*```",
        r"<\|START_ACTION\|>\s*(?P<json>\[.*?)\s*(?:<\|END_ACTION\|>|\Z)",  # Command
    )
)
_NAMED_JSON = tuple(
    re.compile(pattern, re.DOTALL | re.MULTILINE)
    for pattern in (
        rf"<function=(?P<name>{_NAME})>\s*(?P<json>\{{.*?\}})\s*(?:</function>|\Z)",  # Llama 3.1
        rf"\[TOOL_CALLS\]\s*(?P<name>{_NAME})(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?P<json>\{{.*?\}})\s*(?=\[TOOL_CALLS\]|\Z)",  # Mistral, newer
        rf"<\uff5ctool\u2581call\u2581begin\uff5c>(?:function<\uff5ctool\u2581sep\uff5c>)?(?P<name>{_NAME})(?:<\uff5ctool\u2581sep\uff5c>|\n```json\n)(?P<json>\{{.*?\}})\s*(?:```\s*)?"
        r"<\uff5ctool\u2581call\u2581end\uff5c>",  # DeepSeek
        r"<\|tool_call_begin\|>(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?<\|tool_call_argument_begin\|>(?P<json>.*?)<\|tool_call_end\|>",  # Kimi
        r"to=functions\.(?P<name>[\w.-]+)[^{]*?<\|message\|>\s*(?P<json>\{.*?\})\s*(?:<\|call\|>|\Z)",  # gpt-oss
        rf"^Action:\s*(?P<name>{_NAME})\s*\n\s*Action Input:\s*(?P<json>\{{.*?\}})\s*(?=^\w+:|\Z)",  # ReAct
    )
)
_NAMED_TEXTS = tuple(
    (re.compile(call, re.DOTALL), re.compile(argument, re.DOTALL))
    for call, argument in (
        (
            rf"<function=(?P<name>{_NAME})>(?P<body>.*?)</function>",  # Qwen 3 Coder
            r"<parameter=(?P<key>[^>]+)>\n?(?P<text>.*?)\n?</parameter>",
        ),
        (
            r'<invoke name="(?P<name>[^"]+)">(?P<body>.*?)</invoke>',  # Claude, MiniMax
            r'<parameter name="(?P<key>[^"]+)"[^>]*>(?P<text>.*?)</parameter>',
        ),
        (
            rf"<tool_call>\s*(?P<name>{_NAME})\s*(?P<body>(?:<arg_key>.*?)?)\s*</tool_call>",  # GLM
            r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<text>.*?)</arg_value>",
        ),
    )
)
_PYTHON = re.compile(
    r"\A(?:<\|python_start\|>|```(?:tool_code|python)\s)?\s*(?P<code>\[\s*[\w.]+\(.*\)\s*\]|[\w.]+\(\w+\s*=.*\))\s*(?:<\|python_end\|>|```)?\Z",
    re.DOTALL,
)  # Llama 4, Gemma
_BETWEEN = re.compile(r"[\s;,]*")
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALL_KEYS = frozenset(("type", "id", "index", "call_id", "name", "status", *_ARGUMENTS))
_WRAPPERS = ("function", "functionCall", "function_call")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool's name and its arguments; ``texts`` has those that the answer wrote as bare texts."""

    name: str
    arguments: Mapping[str, object]
    texts: Mapping[str, str] = field(default_factory=dict)


def calls_in(answer: str) -> tuple[Call, ...]:
    """Return the calls of an answer, in its order; none where it calls nothing, or what it writes is no call."""
    for reader in (_named_json, _named_texts, _marked, _bare, _python):
        if found := tuple(reader(answer)):
            return found
    return ()


def _named_json(answer: str) -> Iterator[Call]:
    for pattern in _NAMED_JSON:
        found = pattern.finditer(answer)
        yield from _whole([_read([{"name": one["name"], "arguments": one["json"]}]) for one in found])


def _whole(blocks: Iterable[Iterable[Call]]) -> Iterator[Call]:
    """Yield the calls of all blocks; none where one of them is damaged, for the answer is no good then."""
    read = [tuple(block) for block in blocks]
    if all(read):
        yield from chain.from_iterable(read)


def _named_texts(answer: str) -> Iterator[Call]:
    for call, argument in _NAMED_TEXTS:
        yield from _whole(_of_texts(one["name"], one["body"], argument) for one in call.finditer(answer))


def _of_texts(name: str, body: str, argument: re.Pattern[str]) -> Iterator[Call]:
    """Yield the call, unless something else stands between its arguments."""
    texts = {found["key"].strip(): found["text"] for found in argument.finditer(body)}
    if not argument.sub("", body).strip():
        yield Call(name=name, arguments={key: _value(text) for key, text in texts.items()}, texts=texts)


def _value(text: str) -> object:
    try:
        return read_json_value(text)
    except ValueError:
        return text


def _marked(answer: str) -> Iterator[Call]:
    for pattern in _MARKED:
        if found := tuple(_whole(_read(_values(one["json"])) for one in pattern.finditer(answer))):
            yield from found
            return


def _bare(answer: str) -> Iterator[Call]:
    """Yield the calls of an answer that is nothing but calls in JSON."""
    return _read(_values(answer))


def _values(text: str) -> list[object]:
    """Return the JSON values that a text is, one after the other; none where there is anything else."""
    values, place = list[object](), 0
    decoder = json.JSONDecoder()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        values.append(value)
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
    return values


def _read(values: Sequence[object]) -> Iterator[Call]:
    """Yield the calls that JSON values are; none where one of them is no call."""
    plain = [call for value in values for call in _plain(value)]
    if not plain or not all(plain):
        return
    try:
        calls = read_calls(plain, "the answer")
    except RowFault:
        return
    for call in json.loads(calls.dump):
        yield Call(name=call["function"]["name"], arguments=call["function"].get("arguments", {}))


def _plain(value: object) -> list[dict[str, object]]:
    """Return the calls of a value as names with arguments; an empty one for what is no call."""
    if isinstance(value, list):
        return [call for item in value for call in _plain(item)]
    if not isinstance(value, dict):
        return [{}]
    if isinstance(several := value.get("tool_calls"), list):
        return _plain(several)
    for wrapper in _WRAPPERS:
        if isinstance(inner := value.get(wrapper), dict):
            return _plain(inner)
    key = next((key for key in _ARGUMENTS if key in value), "")
    if not key or not isinstance(value.get("name"), str) or value.keys() - _CALL_KEYS:
        return [{}]
    return [{"name": value["name"], "arguments": value[key]}]


def is_python(answer: str) -> bool:
    """Return whether an answer is a call in Python, which code is as well."""
    return bool(tuple(_python(answer)))


def _python(answer: str) -> Iterator[Call]:
    """Yield the calls of an answer that is a list of calls in Python with named arguments; nothing is run."""
    match = _PYTHON.match(answer)
    if match is None:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # what Python says of the text is nothing to the user
            tree = ast.parse(match["code"], mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        yield from [_of_node(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return


def _of_node(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or not all(part.arg for part in node.keywords):
        raise ValueError("no call")
    arguments = {str(part.arg): ast.literal_eval(part.value) for part in node.keywords}
    return Call(name=ast.unparse(node.func), arguments=json.loads(json.dumps(arguments)))
