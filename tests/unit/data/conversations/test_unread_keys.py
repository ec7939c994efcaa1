"""Whatever a row says is read, or harmless, or the row is refused by name: nothing that changes what it means is dropped."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema, parse_renames
from sftcli.data.conversations.keys.dropped_keys import parse_ignored
from sftcli.data.conversations.keys.meaning import BY_KEY
from sftcli.data.conversations.messages import Conversation, PlainText, Rejected
from sftcli.data.conversations.row_reader import RowReader
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.errors import DataError, StoppedError, UsageError
from sftcli.events import NeverStop, StopFlag

PAGE = Path(__file__).parents[4] / "docs" / "data-formats.md"
ASKED = {"role": "user", "content": "Name a fruit."}
BAD, GOOD = {"role": "assistant", "content": "Brick."}, {"role": "assistant", "content": "A pear."}
PAIR = {"prompt": "Name a fruit.", "completion": "A pear."}
TEXT = {"text": "Pears are sold by the kilo."}
INSTANCE = {"instruction": "Say it.", "instances": [{"input": "", "output": "It."}]}


def chat(**keys: object) -> dict[str, object]:
    """Return a conversation whose first, bad answer holds ``keys``."""
    return {"messages": [ASKED, BAD | keys, {"role": "user", "content": "Really?"}, GOOD]}


def asked(**keys: object) -> dict[str, object]:
    return {"messages": [ASKED | keys, GOOD]}


def turn_with_thinking_part(**keys: object) -> dict[str, object]:
    parts = [{"type": "thinking", "thinking": "A wall?"} | keys, {"type": "text", "text": "A pear."}]
    return {"messages": [ASKED, GOOD | {"content": parts}]}


def part(**keys: object) -> dict[str, object]:
    """Return a conversation whose answer has two parts, the first with ``keys``."""
    first, second = {"type": "text", "text": "A wall?"} | keys, {"type": "text", "text": "A pear."}
    return {"messages": [ASKED, GOOD | {"content": [first, second]}]}


THINKING = (
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thinking_blocks",
    "thought",
    "thoughts",
)
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")

REFUSED = [
    *((key, chat() | {key: "A wall?"}) for key in THINKING),
    *((key, asked(**{key: "A wall?"})) for key in THINKING),
    ("reasoning", TEXT | {"reasoning": "A wall?"}),
    ("reasoning", part(reasoning="A wall?")),
    *((key, chat(**{key: 0.5})) for key in MARKS),
    *((key, chat(**{key: "0.5"})) for key in MARKS),
    *((key, chat(**{key: [0, 1]})) for key in MARKS),
    *((key, PAIR | {key: False}) for key in MARKS),
    *((key, PAIR | {key: 0}) for key in MARKS),
    *((key, TEXT | {key: 0.3}) for key in MARKS),
    *((key, asked(**{key: True})) for key in MARKS if key != "weight"),
    ("loss_scale", chat(loss_scale=0.1)),
    ("mask", chat(mask=True)),
    ("mask", PAIR | {"mask": [0, 1]}),
    ("train_detail", chat(train_detail=[{"begin_offset": 0, "end_offset": 3, "train": False}])),
    *((key, part(**{key: 0.5})) for key in MARKS),
    ("loss_scale", part(loss_scale=0)),
    ("loss", asked(content=[{"type": "text", "text": "Name a fruit.", "loss": True}])),
    ("loss_mask", turn_with_thinking_part(loss_mask=0)),
    ("history", chat() | {"history": [["Long?", "Rain."]]}),
    ("history", TEXT | {"history": '[["Long?", "Rain."]]'}),
    ("label", INSTANCE | {"label": False}),
    ("kto_tag", INSTANCE | {"kto_tag": 0}),
    ("chat_template_kwargs", TEXT | {"chat_template_kwargs": {"enable_thinking": False}}),
    ("role", TEXT | {"role": "prompter", "parent_id": None, "message_id": "m1"}),
    ("parent_id", TEXT | {"role": "assistant", "parent_id": "m1", "message_id": "m2"}),
    ("images", chat() | {"images": ["pear.png"]}),
    ("image", chat(image="pear.png")),
    ("audio", chat(audio={"id": "a1"})),
    ("channel", chat(channel="analysis")),
    ("tools", {"messages": [{"role": "system", "content": "Help.", "tools": [{"name": "f"}]}, ASKED, GOOD]}),
    ("context", {"question": "How long?", "context": "The bridge is 40 m long.", "answer": "40 m."}),
    ("input", PAIR | {"input": "Pears and bricks."}),
    ("prompt", {"prompt": "Translate.", "input": "Hallo", "output": "Hello"}),
    ("question", PAIR | {"question": "What is for supper?"}),
    ("response", PAIR | {"response": "A brick."}),
    ("answer", {"question": "How many?", "response": "Two and two are four.", "answer": "4"}),
    ("response", {"instruction": "Name a fruit.", "output": "A pear.", "response": "A brick."}),
    (
        "completion",
        {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "No.", "completion": "Plum."},
    ),
    ("answer", {"messages": [ASKED, GOOD, {"role": "user", "content": "Another?"}], "answer": "A plum."}),
    ("answer", TEXT | {"answer": "Brick."}),
    ("system_prompt", PAIR | {"system": "Be brief.", "system_prompt": "Be long."}),
    ("conversations", chat() | {"conversations": [{"from": "human", "value": "Hi"}]}),
    ("position_ids", {"input_ids": [1, 5, 2, 1, 6, 2], "position_ids": [0, 1, 2, 0, 1, 2]}),
    ("labels", {"prompt": "Name fruits.", "completions": ["A pear.", "A brick."], "labels": [True, False]}),
    ("ratings", {"prompt": "Name fruits.", "response": ["A pear.", "A brick."], "ratings": [5, 0.5]}),
    ("completions", PAIR | {"completion": ["A pear."], "completions": ["A plum."]}),
    ("completions", PAIR | {"completions": ["A plum."]}),
    ("chat markup", {"text": "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\nA pear."}),
    ("chat markup", {"text": "<s>[INST] Name a fruit. [/INST] A pear.</s>"}),
    ("chat markup", {"text": "<|start_header_id|>user<|end_header_id|>\n\nName a fruit."}),
    ("chat markup", {"text": "<start_of_turn>user\nName a fruit.<end_of_turn>"}),
    ("chat markup", {"text": "### Human: Name a fruit.### Assistant: A pear."}),
    ("chat markup", {"text": "Below ...\n\n### Instruction:\nName a fruit.\n\n### Response:\nA pear."}),
    ("chat markup", {"text": "Human: Name a fruit.\n\nAssistant: A pear."}),
    ("control token", {"text": "Pears are sold by the kilo.<|im_end|>"}),
]

UNTRAINED = [
    chat(**{key: value})
    for key in MARKS
    for value in (0, 0.0, False, "0", "0.0", "false", "False", " FALSE ")
]

HARMLESS = [
    *(chat(**{key: value}) for key in THINKING for value in (None, "", " ", [], {})),
    *(PAIR | {key: value} for key in THINKING for value in (None, "", "on", "off", True, 7)),
    *(chat(**{key: value}) for key in MARKS for value in (None, True, 1, 1.0, "1", "true", "True")),
    *(PAIR | {key: value} for key in MARKS for value in (None, True, 1, 1.0, "1", "true", "True")),
    asked(weight=1),
    asked(train=False, loss_mask=0, weight="0", loss="false"),
    PAIR | {"history": []},
    PAIR | {"history": "[]"},
    PAIR | {"history": None, "images": [], "label": None, "chat_template_kwargs": {"enable_thinking": None}},
    PAIR | {"label": True},
    PAIR | {"label": 1},
    PAIR | {"label": "fruit"},
    PAIR | {"role": "a grocer", "parent_id": "p1"},
    TEXT | {"label": 0},
    TEXT | {"parent_id": "p1"},
    PAIR | {"id": 3, "source": "a quiz", "date": "2020-01-01", "train_loss": 0.2, "reasoning_tokens": 9},
    PAIR | {"question": "Name a fruit."},
    PAIR | {"question": "You are a grocer. Name a fruit. Be brief."},
    PAIR | {"response": " A pear."},
    PAIR | {"context": None, "input": "", "system": "", "system_prompt": "Be brief."},
    chat() | {"answer": "4", "prompt": "something else"},
    {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "No.", "score_chosen": 5},
    {"text": "The **Human:** heading and a <think> tag are no conversation."},
    {"text": "operation = table[inst] + 3"},
]


def read(
    *rows: dict[str, object],
    ignored: tuple[str, ...] = (),
    score_column: str | None = None,
    may_hold_control: bool = False,
    stop: StopFlag | None = None,
) -> Iterator[Conversation | PlainText | Rejected]:
    records = [
        RawRecord(fields=row, origin=Origin(path="rows.jsonl", line=line)) for line, row in enumerate(rows, 1)
    ]
    reader = RowReader(
        schema=detect_schema(records, dropped=parse_ignored(ignored)),
        train_on=TrainOn.ALL,
        score_column=score_column,
        find_control=None if may_hold_control else lambda text: "<|im_end|>" if "<|im_end|>" in text else "",
        stop=stop or NeverStop(),
    )
    return reader.read(records)


def flags_of(error: DataError) -> list[str]:
    """Return the flags that the help of a refusal ends in."""
    return error.hint.partition("or train without the key: ")[2].split()


@pytest.mark.parametrize(("key", "row"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_key_that_changes_what_a_row_means_is_refused_by_name_and_can_be_dropped(key, row):
    with pytest.raises(DataError) as caught:
        list(read(row))
    name = f'"{key}"' if " " not in key else key
    assert caught.value.message.startswith("rows.jsonl:1: ")
    assert name in caught.value.message
    assert "(1 of 1 rows)" in caught.value.message
    flags = flags_of(caught.value)
    kept = read(row, ignored=tuple(flags[1::2]) if flags[0] == "--ignore" else (), may_hold_control=True)
    assert not any(isinstance(made, Rejected) for made in kept)


@pytest.mark.parametrize("row", UNTRAINED, ids=str)
def test_turn_that_is_marked_as_not_trained_is_not_trained(row):
    (made,) = read(row)
    assert [(turn.content, turn.trained) for turn in made.messages[1::2]] == [
        ("Brick.", False),
        ("A pear.", True),
    ]


@pytest.mark.parametrize("row", HARMLESS, ids=str)
def test_harmless_keys_change_nothing(row):
    bare = {
        key: value
        for key, value in row.items()
        if key in {*PAIR, *TEXT, "messages", "chosen", "system_prompt"}
    }
    (made,), (plain,) = read(row), read(bare)
    assert made == plain
    assert not isinstance(made, Rejected)


def test_refusal_names_all_keys_with_their_counts_and_first_rows():
    rows = [PAIR, PAIR | {"image": "a.png"}, PAIR, PAIR | {"image": "b.png", "train": False}]
    made = read(*rows, *[PAIR] * 6)
    assert isinstance(next(made), Conversation)
    with pytest.raises(DataError) as caught:
        next(made)
    first, second = caught.value.message.split("; ")
    assert first.startswith('rows.jsonl:2: "image" is not read')
    assert first.endswith("(2 of 10 rows)")
    assert second.startswith('rows.jsonl:4: "train" is not read')
    assert second.endswith("(1 of 10 rows)")
    assert flags_of(caught.value) == ["--ignore", "image", "--ignore", "train"]
    assert caught.value.location.line == 2


def test_keys_of_a_row_and_of_all_its_turns_are_named_at_once():
    row = chat(images=["wall.png"]) | {"history": [["a", "b"]]}
    row["messages"][3] = GOOD | {"channel": "commentary"}
    with pytest.raises(DataError) as caught:
        list(read(row))
    flags = flags_of(caught.value)
    assert flags == ["--ignore", "history", "--ignore", "images", "--ignore", "channel"]
    assert len(list(read(row, ignored=tuple(flags[1::2])))) == 1


def test_key_behind_the_rows_of_detection_is_refused_too():
    with pytest.raises(DataError, match=r"rows\.jsonl:301: .*\(1 of 301 rows\)"):
        list(read(*[PAIR] * 300, PAIR | {"image": "a.png"}))


def test_counting_what_is_not_read_can_be_stopped():
    class Stop(NeverStop):
        def requested(self) -> bool:
            return True

    with pytest.raises(StoppedError):
        list(read(PAIR | {"train": False}, PAIR, stop=Stop()))


def test_the_score_column_is_read():
    (made,) = read(PAIR | {"weight": 0.3}, score_column="weight")
    assert made.score == 0.3


def test_turns_in_tables_are_looked_at_as_json_text_too():
    row = {"conversations": json.dumps(chat(images=["wall.png"])["messages"])}
    with pytest.raises(DataError, match='"images" of turns'):
        list(read(row))
    assert [turn.content for made in read(row, ignored=("images",)) for turn in made.messages] == [
        "Name a fruit.", "Brick.", "Really?", "A pear.",
    ]  # fmt: skip


def test_nested_instances_are_looked_at_one_by_one():
    row = {
        "instruction": "Say.",
        "instances": [{"input": "", "output": "So."}, {"output": "No.", "label": False}],
    }
    with pytest.raises(DataError, match='"label" is not read'):
        list(read(row))


def test_contents_stay_as_they_are_where_keys_are_dropped():
    row = {"prompt": '[{"weight": 0}]', "completion": " {}", "train": False}
    (made,) = read(row, ignored=("train", "weight"))
    assert [turn.content for turn in made.messages] == ['[{"weight": 0}]', " {}"]


@pytest.mark.parametrize(("key", "near"), [("histroy", "history"), ("reasonning", "reasoning")])
def test_key_that_needs_no_dropping_is_refused_with_the_nearest(key, near):
    with pytest.raises(UsageError, match=repr(key)) as caught:
        parse_ignored([key])
    assert near in caught.value.hint


@pytest.mark.parametrize(
    "row",
    [row for key, row in REFUSED if key in ("context", "input", "prompt")],
    ids=lambda row: ", ".join(row),
)
def test_columns_that_are_not_read_are_read_with_the_named_mapping(row):
    with pytest.raises(DataError) as caught:
        list(read(row))
    maps = parse_renames(re.findall(r"--map ([\w=]+)", caught.value.hint))
    record = RawRecord(fields=row, origin=Origin(path="rows.jsonl", line=1))
    (made,) = to_conversations(record, detect_schema([record], renames=maps), train_on=TrainOn.ALL)
    assert isinstance(made, Conversation)
    asked = [text for name, text in row.items() if name not in ("answer", "completion", "output")]
    assert [turn.content for turn in made.messages][:-1] == ["\n\n".join(asked)]


def test_no_mapping_is_named_that_cannot_read_the_column():
    with pytest.raises(DataError, match='"context" is not read') as caught:
        list(read({"question": "Is it?", "answer": "Yes.", "context": {"contexts": ["It is."]}}))
    assert "--map" not in caught.value.hint
    assert "--ignore context" in caught.value.hint


def test_nulls_that_a_table_fills_in_say_nothing(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    told = {"history": [["a", "b"]], "loss": False}
    marked = chat(images=["wall.png"], train=False)
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist([chat() | dict.fromkeys(told), chat(), marked | told]), path
    )
    records = list(read_records(parse_source(str(path)), seed=0))
    with pytest.raises(DataError) as caught:
        list(read(*(record.fields for record in records)))
    assert caught.value.message.count("(1 of 3 rows)") == len(told) + 1  # and the images of a turn
    rest = [record.fields for record in records[:2]]
    assert [len(made.messages) for made in read(*rest)] == [4, 4]


def test_the_page_has_every_key_of_the_table():
    named = set(re.findall(r"`(\w+)`", PAGE.read_text("utf-8")))
    assert BY_KEY.keys() - named == set()
    assert BY_KEY.keys() - {key for key, _ in REFUSED} <= {
        "functions",
        "training_detail",
        "video",
        "videos",
        "audios",
    }
