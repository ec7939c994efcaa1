"""Calls are the same however a template writes them, and are compared by name, arguments and schema."""

import json

import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.settings import Settings
from sftcli.services.evaluate.checks.calls import calls_in
from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.evaluate.checks.rows import with_rows
from sftcli.services.evaluate.checks.table import find_checks

CALL = {
    "name": "get_weather",
    "arguments": {"city": 'Kings "}" Cross', "days": 3, "units": ["C", {"wind": None}], "now": True},
}
JSON = json.dumps(CALL)
ARGUMENTS = json.dumps(CALL["arguments"])
TEXT = json.dumps({**CALL, "arguments": ARGUMENTS})
TEXTS = {
    key: value if isinstance(value, str) else json.dumps(value) for key, value in CALL["arguments"].items()
}
BAR, LOW = "\uff5c", "\u2581"

SPELLINGS = {
    "bare": JSON,
    "arguments as text": TEXT,
    "Hermes": f"Let me look.\n<tool_call>\n{JSON}\n</tool_call>",
    "Llama 3": "<|python_tag|>" + JSON.replace('"arguments"', '"parameters"'),
    "Llama 3.1": f"<function=get_weather>{ARGUMENTS}</function>",
    "Mistral": f"[TOOL_CALLS] [{JSON}]",
    "Mistral, newer": f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
    "OpenAI": json.dumps({"tool_calls": [{"id": "1", "type": "function", "function": json.loads(TEXT)}]}),
    "Responses": json.dumps({"type": "function_call", "call_id": "1", **json.loads(TEXT)}),
    "Anthropic": json.dumps({"type": "tool_use", "id": "1", "name": "get_weather", "input": CALL["arguments"]}),
    "Gemini": json.dumps({"functionCall": {"name": "get_weather", "args": CALL["arguments"]}}),
    "Glaive": f"<functioncall> {TEXT}",
    "fence": f"```json\n{JSON}\n```",
    "Qwen 3 Coder": "<tool_call>\n<function=get_weather>\n"
    + "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in TEXTS.items())
    + "</function>\n</tool_call>",
    "GLM": "<tool_call>get_weather\n"
    + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n" for key, text in TEXTS.items())
    + "</tool_call>",
    "invoke": '<invoke name="get_weather">'
    + "".join(f'<parameter name="{key}">{text}</parameter>' for key, text in TEXTS.items())
    + "</invoke>",
    "DeepSeek 3": f"<{BAR}tool{LOW}calls{LOW}begin{BAR}><{BAR}tool{LOW}call{LOW}begin{BAR}>function<{BAR}tool{LOW}sep{BAR}>get_weather\n"
    f"```json\n{ARGUMENTS}\n```<{BAR}tool{LOW}call{LOW}end{BAR}><{BAR}tool{LOW}calls{LOW}end{BAR}>",
    "DeepSeek 3.1": f"<{BAR}tool{LOW}call{LOW}begin{BAR}>get_weather<{BAR}tool{LOW}sep{BAR}>{ARGUMENTS}<{BAR}tool{LOW}call{LOW}end{BAR}>",
    "Kimi": f"<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>",
    "gpt-oss": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "ReAct": f"Thought: I look.\nAction: get_weather\nAction Input: {ARGUMENTS}",
    "Python": "[get_weather(" + ", ".join(f"{key}={value!r}" for key, value in CALL["arguments"].items()) + ")]",
}  # fmt: skip
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 7}},
                    "required": ["city"],
                },
            },
        }
    ]
)


def grade(answer, expected=JSON, tools=""):
    row = AskedRow(origin="rows.jsonl:1", expected=expected, tools=tools)
    (check,) = find_checks(("tool",), [row, AskedRow(origin="rows.jsonl:2", expected=JSON)])
    found = check.grade(answer, row)
    return found.score, dict(found.parts)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_call_is_the_same_in_every_spelling(spelling):
    (call,) = calls_in(SPELLINGS[spelling])
    assert (call.name, dict(call.arguments)) == (CALL["name"], CALL["arguments"])
    all_right = {"called": 1, "name": 1, "arguments": 1}
    assert grade(SPELLINGS[spelling]) == grade(JSON, SPELLINGS[spelling]) == (1, all_right)


@pytest.mark.parametrize(
    "text",
    [
        "get_weather(city=1) would tell",
        '{"name": "Bob", "age": 3}',
        '{"name": "get_weather", "description": "", "parameters": {"type": "object"}}',
        f"{JSON} is what I would call",
        f"<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{JSON[:-9]}\n</tool_call>",
        f"<function=get_weather>{ARGUMENTS}</function><function=get_weather>{{no}}</function>",
        "main()",
        "print('a')",
        '{"name": "f", "arguments": "no JSON"}',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        "[f(a=open('x'))]",
        "[" * 50_000,
    ],
)
def test_what_is_no_call_is_none(text):
    assert calls_in(text) == ()


WRONG = {
    "another name": (JSON.replace("get_weather", "get_news"), {"called": 1, "name": 0, "arguments": 1}),
    "another argument": (JSON.replace("3", "4"), {"called": 1, "name": 1, "arguments": 0}),
    "a text for a number": (JSON.replace("3", '"3"'), {"called": 1, "name": 1, "arguments": 0}),
    "no call": ("It rains.", {"called": 0, "name": 0, "arguments": 0}),
    "one call too many": (f"[{JSON}, {JSON}]", {"called": 1, "name": 0, "arguments": 0}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_call_is_told_by_its_part(fault):
    answer, parts = WRONG[fault]
    assert grade(answer) == (0, parts)


def test_several_calls_may_come_in_any_order():
    other = json.dumps({"name": "get_news", "arguments": {}})
    assert grade(f"{other}\n{JSON}", f"[{JSON}, {other}]")[0] == 1


def test_an_answer_that_is_to_call_nothing_is_right_without_a_call():
    assert grade("It rains.", "It is dry.") == (1, {"called": 1})
    assert grade(JSON, "It is dry.") == (0, {"called": 0})


@pytest.mark.parametrize(
    ("answer", "is_allowed"),
    [
        ('{"name": "get_weather", "arguments": {"city": "Rome", "days": 7}}', 1),
        ('{"name": "get_weather", "arguments": {"city": "Rome", "days": 8}}', 0),
        ('{"name": "get_weather", "arguments": {"days": 7}}', 0),
        ('{"name": "get_news", "arguments": {"city": "Rome"}}', 0),
        ("It rains.", 0),
        # A spelling without quotes: it is the tool that says what is text.
        ("<function=get_weather>\n<parameter=city>\n1066\n</parameter>\n</function>", 1),
        (
            "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\nx\n</parameter>\n</function>",
            0,
        ),
    ],
)
def test_arguments_are_what_the_schema_of_the_tool_allows(answer, is_allowed):
    pytest.importorskip("jsonschema")
    want = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    assert grade(answer, want, TOOLS)[1]["schema"] == is_allowed


def test_a_schema_is_never_fetched_and_a_broken_one_grades_nothing(monkeypatch):
    pytest.importorskip("jsonschema")
    monkeypatch.setattr("socket.socket.connect", pytest.fail)
    for broken in (
        {"$ref": "http://127.0.0.1:9/x"},
        {"type": "no type"},
        {"properties": {"city": {"pattern": "("}}},
    ):
        tools = json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": broken}}])
        assert "schema" not in grade(JSON, tools=tools)[1]


@pytest.mark.parametrize(
    ("column", "renames"), [("tools", []), ("functions", []), ("known", ["tools=known"])]
)
def test_tools_are_those_of_the_row_under_any_name(tmp_path, column, renames):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": JSON, column: json.loads(TOOLS)},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataSettings(sources=(str(path),), renames=tuple(renames))
    found = with_rows([AskedRow(origin=f"{path}:2", expected=JSON)], Settings(data=data))
    assert json.loads(found[0].tools) == json.loads(TOOLS)
    assert found[0].fields == rows[1]


def test_a_call_in_python_is_one_of_a_tool_where_the_prompt_names_it():
    rows = [
        AskedRow(
            origin=f"rows.jsonl:{line}", expected=f"[turn(by={line})]", prompt="Tools: turn(by)\n\nTurn!"
        )
        for line in (1, 2)
    ]
    assert [check.name for check in find_checks(("auto",), rows)] == ["tool"]
