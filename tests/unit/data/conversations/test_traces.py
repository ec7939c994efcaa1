"""Traces of agents, as OpenAI's Responses and Anthropic's Messages write them, are conversations."""

import json

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.keys.meaning import UnreadError
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.reading.record import RawRecord
from tests.support.chat import ORIGIN

ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Is the ferry late?"}]}
CALL = {
    "type": "function_call",
    "id": "fc_7",
    "call_id": "call_7",
    "name": "timetable",
    "arguments": '{"line":4}',
}
GAVE = {"type": "function_call_output", "call_id": "call_7", "output": '{"delay":12}'}
SAID = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "By 12 minutes."}],
}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Look it up."}]}


def read(row):
    record = RawRecord(fields=row, origin=ORIGIN)
    (made,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.ALL)
    return made


def turns(row):
    made = read(row)
    assert isinstance(made, Conversation), made
    return [
        (
            turn.role,
            turn.thinking,
            turn.content,
            [call["function"]["name"] for call in json.loads(turn.tool_calls or "[]")],
            (turn.name, turn.tool_call_id),
        )
        for turn in made.messages
    ]


NONE = ("", "")
EXPECTED = [
    ("user", "", "Is the ferry late?", [], NONE),
    ("assistant", "Look it up.", "One moment.", ["timetable"], NONE),
    ("tool", "", '{"delay":12}', [], ("timetable", "call_7")),
    ("assistant", "", "By 12 minutes.", [], NONE),
]
MOMENT = {"role": "assistant", "content": "One moment."}


def test_items_of_one_answer_are_one_turn():
    assert turns({"messages": [ASKED, THOUGHT, MOMENT, CALL, GAVE, SAID]}) == EXPECTED


def test_a_request_and_its_response_are_one_conversation():
    row = {
        "instructions": "Be brief.",
        "input": [ASKED, THOUGHT, MOMENT, CALL, GAVE],
        "output": [SAID],
        "tools": [{"type": "function", "name": "timetable", "parameters": {}}],
    }
    assert turns(row) == [("system", "", "Be brief.", [], NONE), *EXPECTED]
    made = read(row)
    assert isinstance(made, Conversation)
    assert json.loads(made.tools)[0]["function"] == {"name": "timetable", "parameters": {}}
    assert not detect_schema([RawRecord(fields=row, origin=ORIGIN)]).ignored


def test_a_prompt_that_is_a_text_has_items_for_its_answer():
    assert turns({"input": "Is the ferry late?", "output": [THOUGHT, SAID]}) == [
        EXPECTED[0],
        ("assistant", "Look it up.", "By 12 minutes.", [], NONE),
    ]


def test_instructions_beside_a_text_are_refused_by_name():
    with pytest.raises(UnreadError, match='"instructions" is not read'):
        read({"instructions": "Translate.", "input": "Hund", "output": "dog"})


def test_several_calls_and_several_thoughts_belong_to_one_turn():
    second = CALL | {"call_id": "call_8", "name": "weather"}
    later = GAVE | {"call_id": "call_8", "output": "fog"}
    row = {"messages": [ASKED, THOUGHT, THOUGHT, CALL, second, later, GAVE, SAID]}
    found = turns(row)
    assert found[1] == ("assistant", "Look it up.\n\nLook it up.", "", ["timetable", "weather"], NONE)
    assert [turn[-1] for turn in found[2:4]] == [("weather", "call_8"), ("timetable", "call_7")]


def test_the_reasoning_itself_goes_before_its_summary():
    whole = THOUGHT | {"content": [{"type": "reasoning_text", "text": "Line 4 runs at 9."}]}
    assert turns({"messages": [ASKED, whole, SAID]})[1][1] == "Line 4 runs at 9."


def test_reasoning_without_any_text_says_nothing():
    assert turns({"messages": [ASKED, THOUGHT | {"summary": []}, SAID]})[1][1] == ""


def test_content_blocks_are_turns():
    row = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Is the ferry late?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Look it up.", "signature": "EqQB"},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "call_7", "name": "timetable", "input": {"line": 4}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_7",
                        "content": [{"type": "text", "text": '{"delay":12}'}],
                    },
                    {"type": "text", "text": "And tomorrow?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "By 12 minutes."}]},
        ],
    }
    system, *others = turns(row)
    assert system == ("system", "", "Be brief.", [], NONE)
    assert others == [*EXPECTED[:3], ("user", "", "And tomorrow?", [], NONE), EXPECTED[3]]


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([ASKED, {"type": "web_search_call", "id": "w"}, SAID], "turn 2 is an item of type 'web_search_call'"),
        ([ASKED, THOUGHT], "turn 2 is reasoning, and no answer follows it"),
        ([ASKED, THOUGHT, ASKED, SAID], "turn 3 follows reasoning, and is not the assistant's"),
        ([ASKED, THOUGHT | {"summary": [], "encrypted_content": "gA"}, SAID], "turn 2 holds thinking without a text"),
        ([ASKED, GAVE, SAID], "turn 2 is the result of the call 'call_7', which no turn before it makes"),
        ([ASKED, CALL | {"arguments": "line 4"}, GAVE, SAID], "the arguments are text that is not JSON"),
        (
            [
                {"role": "user", "content": "Late?"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}, {"type": "text", "text": "Wait."}]},
            ],
            "turn 2: a text stands behind a call",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "So?"}, {"type": "tool_result", "tool_use_id": "a", "content": "1"}]}],
            "turn 1: the result of a call stands behind a text",
        ),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": [{"type": "server_tool_use", "id": "a", "name": "f", "input": {}}]},
            ],
            "turn 2: a content part is server_tool_use, expected text",
        ),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_rejected_by_name(messages, detail):
    made = read({"messages": messages})
    assert isinstance(made, Rejected)
    assert made.reason is RejectReason.WRONG_TYPE
    assert detail in made.detail


def test_a_mark_of_an_item_stays_with_its_turn():
    made = read({"messages": [ASKED, CALL | {"train": False}, GAVE, SAID]})
    assert isinstance(made, Conversation)
    assert [turn.trained for turn in made.messages] == [False, False, False, True]
