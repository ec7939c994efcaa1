import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema, parse_renames
from sftcli.data.conversations.formats import RowFormat
from sftcli.data.conversations.messages import (
    Conversation,
    Message,
    PlainText,
    Rejected,
    RejectReason,
    TokenRow,
)
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.errors import DataError, UsageError

GOLDEN = Path(__file__).parents[3] / "golden" / "schemas"
SHARED = Path(__file__).parents[4].parent / "shared" / "data"
FORMATS = {
    "alpaca": RowFormat.ALPACA,
    "dolly": RowFormat.DOLLY,
    "messages": RowFormat.MESSAGES,
    "preference": RowFormat.PREFERENCE,
    "sharegpt": RowFormat.SHAREGPT,
}


def records(*rows, path="rows.jsonl"):
    return [RawRecord(fields=row, origin=Origin(path=path, line=line)) for line, row in enumerate(rows, 1)]


def convert(*rows, train_on=TrainOn.ALL, renames=None):
    read = records(*rows)
    schema = detect_schema(read, renames=renames)
    return [made for record in read for made in to_conversations(record, schema, train_on=train_on)]


def chat(*turns, **columns):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


# Golden files: rows, and what they become


def block(title, text):
    lines = "\n".join(f"    |{line}|" for line in text.replace("\r", "\\r").split("\n"))
    return f"  {title}\n{lines}"


def show(made):
    match made:
        case Rejected():
            return f"{made.origin} rejected, {made.reason}\n    {made.detail}"
        case PlainText():
            return f"{made.origin} text\n{block('text', made.text)}"
        case TokenRow():
            pairs = zip(made.input_ids, made.loss_mask, strict=True)
            tokens = " ".join(f"[{token}]" if trained else f"{token}" for token, trained in pairs)
            return f"{made.origin} tokens, {made.num_trained_turns} trained turns\n    {tokens}"
    cut = f", {made.num_cut} cut off" if made.num_cut else ""
    parts = [f"{made.origin} {len(made.messages)} turns{cut}"]
    if made.tools:
        parts.append(block("tools", made.tools))
    for turn in made.messages:
        facts = [turn.role, "trained" * turn.trained, turn.name, turn.tool_call_id]
        parts.append(block(", ".join(filter(None, facts)), turn.content))
        if turn.tool_calls:
            parts.append(block("  calls", turn.tool_calls))
    return "\n".join(parts)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_rows_of_each_format_become_the_conversations_of_the_golden_file(path):
    head, mark, _ = path.read_text(encoding="utf-8").partition("=== becomes\n")
    read = records(*map(json.loads, head.partition("=== rows.jsonl\n")[2].splitlines()))
    schema = detect_schema(read)
    shown = [show(made) for record in read for made in to_conversations(record, schema, train_on=TrainOn.ALL)]
    golden = f"{head}{mark}{schema}\n\n" + "\n".join(shown) + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(golden, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == golden


def test_every_format_has_a_golden_file():
    assert len(list(GOLDEN.glob("*.txt"))) == len(RowFormat)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
@pytest.mark.parametrize(
    "path",
    sorted(
        file
        for file in SHARED.glob("*/*")
        if file.suffix in {".json", ".jsonl", ".parquet"} and file.parent.name != "text"
    ),
    ids=lambda path: path.name,
)
def test_real_files_are_read_whole_without_any_flag(path):
    read = list(read_records(parse_source(str(path)), seed=0))
    schema = detect_schema(read)
    made = [row for record in read for row in to_conversations(record, schema, train_on=TrainOn.ALL)]
    if path.parent.name in FORMATS and "seed_tasks" not in path.name:
        assert schema.format is FORMATS[path.parent.name]
    assert [row for row in made if isinstance(row, Rejected)] == []
    assert len(made) == len(read)


# Laws

contents = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4), st.sampled_from(TrainOn))
def test_contents_stay_as_they_are_and_only_assistant_turns_are_trained(pairs, train_on):
    turns = [turn for user, answer in pairs for turn in (("user", user), ("assistant", answer))]
    (made,) = convert(chat(*turns), train_on=train_on)
    assert [(turn.role, turn.content) for turn in made.messages] == turns
    trained = [turn for turn in made.messages if turn.trained]
    assert all(turn.role == "assistant" for turn in trained)
    assert len(trained) == (1 if train_on is TrainOn.LAST else len(pairs))
    assert made.messages[-1].trained


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant", "tool", "narrator"]),
            st.one_of(
                st.none(), st.integers(), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2)
            ),
        ),
        max_size=6,
    )
)
def test_any_list_of_turns_gives_a_whole_conversation_or_a_reason(turns):
    (made,) = convert(chat(*turns))
    if isinstance(made, Rejected):
        assert made.reason in RejectReason
        assert made.detail
    else:
        assert made.messages[-1].role == "assistant"
        assert len(made.messages) + made.num_cut == len(turns)


@given(st.text(min_size=1).filter(str.strip), st.text().filter(str.strip))
def test_alpaca_joins_instruction_and_input_with_an_empty_line(instruction, about):
    (made,) = convert({"instruction": instruction, "input": about, "output": "x"})
    assert made.messages[0].content == f"{instruction}\n\n{about}"


# Detection


def test_mixed_formats_are_refused_with_both_shapes_and_their_first_lines():
    with pytest.raises(DataError) as caught:
        convert({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, {"text": "c"})
    assert caught.value.message == (
        "the rows have two formats: rows.jsonl:1 is prompt/completion (prompt, completion), rows.jsonl:3 is text (text)"
    )
    assert caught.value.location.line == 3


def test_a_format_that_changes_behind_the_rows_of_detection_is_refused_too():
    read = records(*[{"prompt": "a", "completion": "b"}] * 300, {"question": "c", "answer": "d"})
    schema = detect_schema(read)
    with pytest.raises(
        DataError, match=r"rows.jsonl:1 is prompt/completion .*rows.jsonl:301 is question/answer"
    ):
        to_conversations(read[-1], schema, train_on=TrainOn.ALL)


def test_a_late_row_of_no_known_format_is_refused_with_the_nearest_one():
    read = records({"text": "a"}, {"instrction": "c", "output": "d"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is of no known format") as caught:
        detect_schema(read)
    assert "nearest to alpaca rows, with --map instruction=instrction" in caught.value.hint


def test_alpaca_rows_with_a_text_column_are_not_taken_for_plain_text():
    (made,) = convert({"instruction": "Hi", "input": "", "output": "Yo", "text": "### Instruction: Hi"})
    assert isinstance(made, Conversation)


def test_a_row_that_lacks_a_column_is_rejected_and_the_others_are_kept():
    made = convert({"prompt": "a"}, {"prompt": "a", "completion": "b"})
    assert [getattr(row, "reason", None) for row in made] == [RejectReason.MISSING_FIELD, None]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"instrction": "a", "output": "b"},
            "they can be read as alpaca rows, with --map instruction=instrction",
        ),
        (
            {"Prompt": "a", "Completion": "b"},
            "they can be read as prompt/completion rows, with --map prompt=Prompt --map completion=Completion",
        ),
        (
            {"prompt ": "a", "response": "b"},
            "they can be read as prompt/response rows, with --map prompt='prompt '",
        ),
        ({"question": "a", "reply": "b"}, "they can be read as openorca rows, with --map response=COLUMN"),
        ({"q": 1}, "map them to a known format: --map prompt=COLUMN --map response=COLUMN"),
        (
            {"data": [{"prompt": "a"}]},
            "the rows seem to be inside 'data': jq -c '.data[]' rows.jsonl > rows-rows.jsonl",
        ),
    ],
)
def test_unknown_columns_are_named_with_the_nearest_format_and_how_to_map_them(row, hint):
    with pytest.raises(DataError) as caught:
        convert(row)
    assert all(repr(name) in caught.value.message for name in row)
    assert "rows.jsonl:1" in caught.value.message
    assert caught.value.hint == hint


def test_the_schema_says_what_it_reads_and_what_it_leaves_and_what_it_is_told_to_drop():
    row = {
        "id": 1,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "date": "c"}],
        "history": [["d", "e"]],
    }
    assert (
        str(detect_schema(records(row))) == "messages rows (messages); not used: id, history, messages[].date"
    )
    assert (
        str(detect_schema(records(row), dropped=frozenset({"history"})))
        == "messages rows (messages); not used: id, messages[].date; dropped on purpose: history"
    )


# Renaming


def test_mapped_columns_are_read_under_the_names_of_the_program():
    renames = parse_renames(["prompt=q", "completion=a"])
    (made,) = convert({"q": "Hi", "a": "Yo", "prompt": "another"}, renames=renames)
    assert [turn.content for turn in made.messages] == ["Hi", "Yo"]


def test_mapping_a_column_that_no_row_has_names_the_nearest():
    with pytest.raises(UsageError, match="'quesion'") as caught:
        convert({"question": "Hi", "a": "Yo"}, renames={"prompt": "quesion"})
    assert caught.value.hint == "did you mean 'question'?"


@pytest.mark.parametrize(
    "texts", [["prompt"], ["=a"], ["prompt="], ["promt=a"], ["prompt=a", "prompt=b"], ["prompt=a", "text=a"]]
)
def test_a_mapping_of_another_form_is_refused(texts):
    with pytest.raises(UsageError) as caught:
        parse_renames(texts)
    assert caught.value.hint


# Turns


@pytest.mark.parametrize("value", [None, 1, 1.5, True, ["a"], {"a": 1}])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_value_that_is_no_text_is_rejected_and_named(column, value):
    (made,) = convert({"question": "a", "answer": "b"} | {column: value})
    assert isinstance(made, Rejected)
    assert made.reason in (RejectReason.WRONG_TYPE, RejectReason.MISSING_FIELD)
    assert str(made).startswith("rows.jsonl:1: ")


def test_a_null_answer_is_named_as_such():
    (made,) = convert({"question": "a", "answer": None})
    assert made.detail == '"answer" is null, expected text'


@pytest.mark.parametrize("answer", ["", " ", "\n", "\u3000"])
def test_a_blank_answer_is_rejected(answer):
    (made,) = convert({"question": "a", "answer": answer})
    assert made.reason is RejectReason.EMPTY_ANSWER


def test_turns_behind_the_last_answer_are_cut_and_counted():
    (made,) = convert(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d")))
    assert (len(made.messages), made.num_cut) == (2, 2)


def test_turns_of_one_role_in_a_row_are_left_to_the_template():
    (made,) = convert(chat(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")))
    assert [turn.trained for turn in made.messages] == [False, False, True, True]


def test_a_system_text_in_a_column_and_in_the_turns_is_refused():
    (made,) = convert(chat(("system", "a"), ("user", "b"), ("assistant", "c"), system="d"))
    assert made.reason is RejectReason.ROLE_ORDER


def test_a_misspelled_role_names_the_nearest():
    (made,) = convert(chat(("user", "a"), ("assitant", "b")))
    assert made.detail == "turn 2: the role 'assitant' is not known (did you mean 'assistant'?)"


def test_turns_may_be_json_text_as_tables_hold_them():
    (made,) = convert(
        {"conversations": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])}
    )
    assert made.messages[0] == Message(role="user", content="a")


def test_tool_call_arguments_become_objects_and_keep_their_order():
    call = {"function": {"name": "f", "arguments": '{"z": 1.0, "a": "é"}'}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    (made,) = convert(row)
    assert made.messages[1].tool_calls == (
        '[{"type":"function","function":{"name":"f","arguments":{"z":1.0,"a":"é"}}}]'
    )
