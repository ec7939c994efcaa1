"""Tool calls as rows, tables and templates write them: nothing of them is lost, made up, or printed as Python prints it."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet
from transformers import AutoTokenizer

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.example import Example
from sftcli.data.reading.record import RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.data.rendering.encode import encode_prompt
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.chat import ORIGIN, rendered, trained_texts
from tests.support.tiny_tokenizer import build_tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
ASK = {"role": "user", "content": "Rain?"}
TOLD = [{"role": "tool", "content": "yes"}, {"role": "assistant", "content": "Yes."}]
HEAD = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
TAIL = "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
CALLS = "{%- for c in m.tool_calls %}{{- c.type + ':' + c.function.name + '\\n' + ARGUMENTS + '\\n' }}{%- endfor %}"


def template(arguments: str) -> str:
    calls = CALLS.replace("ARGUMENTS", arguments)
    return f"{HEAD}{{%- if m.tool_calls %}}{calls}{{%- else %}}{{{{- m.content }}}}{{%- endif %}}{TAIL}"


TEXT = template("c.function.arguments")
OBJECT = template("c.function.arguments | tojson")
PRINTED = template("''").replace("'' + '\\n'", "'' }}{{- c.function.arguments }}{{- '\\n'")


def call(arguments: object, name: str = "rain") -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, object], content: object = "") -> dict[str, object]:
    return {"role": "assistant", "content": content, "tool_calls": list(made)}


def convert(*turns: object, train_on: TrainOn = TrainOn.ALL, **columns: object) -> Conversation | Rejected:
    record = RawRecord(fields={"messages": list(turns), **columns}, origin=ORIGIN)
    (made,) = to_conversations(record, detect_schema([record]), train_on=train_on)
    return made


def converted(*turns: object, **options: object) -> Conversation:
    made = convert(*turns, **options)  # type: ignore[arg-type]
    assert isinstance(made, Conversation), made
    return made


def tokenizer_of(folder: Path, source: str) -> HFChatTokenizer:
    return load_chat_tokenizer(build_tiny_tokenizer(folder, template=source))


def kept(tokenizer: HFChatTokenizer, row: Conversation) -> Example:
    example = Renderer(tokenizer, max_tokens=10_000).render_example(row)
    assert isinstance(example, Example), example
    return example


ARGUMENTS = (
    '{"city": "Bergen"}',
    '{"city":"Bergen",  "days":3.0}',
    '{"a": "Köln \\"Mitte\\"\\n", "b": [1, null, {"c": "\\u00e9"}]}',
    '{"a": "<|im_end|>", "<|im_start|>": true}',
    "{}",
)


@pytest.mark.parametrize("written", ARGUMENTS)
@pytest.mark.parametrize("source", [TEXT, PRINTED])
def test_a_template_that_wants_text_gets_the_row_s_own_as_in_transformers(tmp_path, source, written):
    turns = [ASK, calls(call(written), call(written, "sun")), *TOLD]
    row, tokenizer = converted(*turns), tokenizer_of(tmp_path, source)
    example = kept(tokenizer, row)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turns, tokenize=False)
    assert "".join(tokenizer.decode_many([list(example.input_ids)])) == theirs
    assert trained_texts(example, tokenizer) == [
        f"function:rain\n{written}\nfunction:sun\n{written}\n<|im_end|>",
        "Yes.<|im_end|>",
    ]
    asked = encode_prompt(tokenizer, row.messages[:-1])
    assert list(example.input_ids[: len(asked)]) == asked


def test_an_object_is_written_as_json_where_the_template_wants_text(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TEXT)
    example = kept(tokenizer, converted(ASK, calls(call({"city": "Köln", "n": None}))))
    assert trained_texts(example, tokenizer) == ['function:rain\n{"city": "Köln", "n": null}\n<|im_end|>']


@pytest.mark.parametrize("written", ['{"city":"Bergen"}', {"city": "Bergen"}])
def test_a_template_that_wants_an_object_gets_one(tmp_path, written):
    tokenizer = tokenizer_of(tmp_path, OBJECT)
    example = kept(tokenizer, converted(ASK, calls(call(written))))
    assert trained_texts(example, tokenizer) == ['function:rain\n{"city": "Bergen"}\n<|im_end|>']


def test_what_is_wrong_with_the_form_that_came_furthest_is_told(tmp_path):
    endless = TEXT.replace("{{- '<|im_end|>\\n' }}", "{{- '<|im_start|>\\n' }}")
    row = converted(ASK, calls(call("{}")), *TOLD)
    found = Renderer(tokenizer_of(tmp_path, endless), max_tokens=10_000).render_example(row)
    assert isinstance(found, Rejected)
    assert found.reason is RejectReason.NO_STOP_TOKEN


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("city=Bergen", "text that is not JSON: 'city=Bergen'"),
        ("{'city': 'Bergen'}", "text that is not JSON: \"{'city': 'Bergen'}\""),
        ("", "text that is not JSON: ''"),
        ("[1]", "JSON text of a list, expected an object"),
        ("null", "JSON text of null, expected an object"),
        ([1], "a list, expected an object"),
        (7, "a number, expected an object"),
    ],
)
def test_arguments_that_are_no_json_object_are_refused_by_turn_and_call(arguments, told):
    found = convert(ASK, calls(call("{}"), call(arguments, "sun")), *TOLD)
    assert isinstance(found, Rejected)
    assert (found.reason, found.detail) == (
        RejectReason.WRONG_TYPE,
        f"turn 2: call 2 (sun): the arguments are {told}",
    )


# Tables: a struct has all keys of all rows.

ROWS = [
    {
        "tools": [
            {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
            {"type": "function", "function": {"name": "sun", "parameters": {"type": "object", "properties": {"days": {"type": "integer", "enum": [1, 2]}}, "required": ["days"]}}},
        ],
        "messages": [
            ASK,
            calls(call({"city": "Bergen"}), call({"days": 2, "where": {"x": 1, "y": [{"z": 1}, {"u": "v"}]}}, "sun")),
            *TOLD,
        ],
    },
    {"messages": [ASK, calls(call({})), {"role": "tool", "content": "no", "name": "rain"}, {"role": "assistant", "content": "No."}]},
]  # fmt: skip


def conversations(path: Path) -> list[Conversation | Rejected]:
    records = list(read_records(parse_source(str(path)), seed=0, note=lambda _: None))
    schema = detect_schema(records)
    return [row for record in records for row in to_conversations(record, schema, train_on=TrainOn.ALL)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_a_table_become_what_they_are_as_json(tmp_path, kind):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    expected, found = conversations(lines), conversations(path)
    for there, here in zip(expected, found, strict=True):
        assert isinstance(there, Conversation)
        assert isinstance(here, Conversation)
        assert [json.loads(m.tool_calls or "0") for m in here.messages] == [
            json.loads(m.tool_calls or "0") for m in there.messages
        ]
        assert json.loads(here.tools or "0") == json.loads(there.tools or "0")
        assert [m.content for m in here.messages] == [m.content for m in there.messages]


def test_nulls_of_a_dumped_class_are_left_out_and_those_that_mean_something_stay():
    dumped = {
        "id": "c1",
        "index": None,
        "type": None,
        "function": {"name": "rain", "arguments": {"n": None}, "x": None},
    }
    tool = {"type": "function", "strict": None, "function": {"name": "rain", "description": None, "parameters": {"properties": {"n": {"default": None, "title": None}, "filled": None}}}}  # fmt: skip
    row = converted(ASK, calls(dumped), *TOLD, tools=[tool])
    assert json.loads(row.messages[1].tool_calls) == [
        {"type": "function", "id": "c1", "function": {"name": "rain", "arguments": {"n": None}}}
    ]
    assert json.loads(row.tools) == [
        {
            "type": "function",
            "function": {"name": "rain", "parameters": {"properties": {"n": {"default": None}}}},
        }
    ]


# Neighbouring calls


def test_neighboring_calls_are_one_turn():
    one, two, three = (call(json.dumps({"n": n}), f"f{n}") for n in range(3))
    apart = converted(ASK, calls(one, content="Look."), calls(two, three), *TOLD)
    assert apart == converted(ASK, calls(one, two, three, content="Look."), *TOLD)
    assert apart.messages[1].call_texts == ('{"n": 0}', '{"n": 1}', '{"n": 2}')
    told = [{"from": "human", "value": "Rain?"}, *({"from": "function_call", "value": json.dumps(c["function"])} for c in (one, two, three))]  # fmt: skip
    record = RawRecord(fields={"conversations": told}, origin=ORIGIN)
    (made,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.LAST)
    assert isinstance(made, Conversation)
    assert [turn.trained for turn in made.messages] == [False, True]
    assert made.messages[1].tool_calls == converted(ASK, calls(one, two, three)).messages[1].tool_calls


@pytest.mark.parametrize(
    "between",
    [
        [calls(call("{}")), *TOLD, calls(call("{}"))],
        [calls(call("{}")), {"role": "tool", "content": "yes"}, calls(call("{}"))],
        [calls(call("{}")), calls(call("{}"), content="And?")],
        [calls(call("{}")) | {"weight": 0}, calls(call("{}"))],
        [{"role": "assistant", "content": "Look."}, calls(call("{}"))],
    ],
    ids=["answers", "result", "text", "weight", "no call before"],
)
def test_calls_with_something_between_or_of_another_weight_stay_apart(between):
    assert len(converted(ASK, *between, *TOLD).messages) == 1 + len(between) + len(TOLD)


# Spellings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab\u00fc "{\n', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("xyz", min_size=1), inner, max_size=2)
    ),
    max_leaves=6,
)


def spellings(name: str, arguments: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return one call, its result and the answer to it, in each of six ways to write them down."""
    written = json.dumps(arguments, ensure_ascii=False)
    result = {"role": "tool", "tool_call_id": "c1", "content": "yes"}
    end = {"role": "assistant", "content": "Yes."}

    def chat(call: dict[str, object], result: dict[str, object]) -> dict[str, object]:
        return {"messages": [ASK, {"role": "assistant", "content": None, **call}, result, end]}

    def openai(arguments: object) -> dict[str, object]:
        return {"tool_calls": [{"id": "c1", **call(arguments, name)}]}

    return {
        "object": chat(openai(arguments), result),
        "text": chat(openai(written), result),
        "legacy": chat(
            {"function_call": {"name": name, "arguments": written}},
            {"role": "function", "name": name, "content": "yes"},
        ),
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": json.dumps({"name": name, "arguments": arguments})},
                {"from": "observation", "value": "yes", "name": name},
                {"from": "gpt", "value": "Yes."},
            ]
        },
        "responses": {
            "messages": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
                {
                    "type": "function_call",
                    "id": "fc_1",
                    "call_id": "c1",
                    "name": name,
                    "arguments": written,
                    "status": "completed",
                },
                {"type": "function_call_output", "call_id": "c1", "output": "yes"},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
                },
            ]
        },
        "anthropic": {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": name, "input": arguments}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "yes"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ]
        },
    }


NAMED = OBJECT.replace("+ m.role +", "+ m.role + (' of ' + m.name if m.name else '') +")


@pytest.fixture(scope="module")
def naming_tokenizer(tmp_path_factory) -> HFChatTokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("naming"), NAMED)


@given(
    name=st.text("abc_", min_size=1, max_size=8), arguments=st.dictionaries(st.text("ab"), JSON, max_size=3)
)
def test_a_call_gives_the_same_ids_however_it_is_spelled(naming_tokenizer, name, arguments):
    made = {}
    for spelling, row in spellings(name, arguments).items():
        record = RawRecord(fields=row, origin=ORIGIN)
        (read,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.ALL)
        assert isinstance(read, Conversation), (spelling, read)
        (example,) = rendered(naming_tokenizer, read)
        made[spelling] = (example.input_ids.tolist(), example.loss_mask.tolist())
    assert all(each == made["object"] for each in made.values()), made


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}},
        {"name": "rain", "parameters": {"type": "object"}},
        {"type": "function", "name": "rain", "parameters": {"type": "object"}},
        {"name": "rain", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
    ],
    ids=["chat", "bare", "responses", "anthropic"],
)
def test_a_tool_is_the_same_however_it_is_spelled(tool):
    assert json.loads(converted(ASK, *TOLD[1:], tools=[tool]).tools) == TOOLS
