"""Files of prompts: what is asked is read, or the row is refused by name."""

import csv
import gzip
import json
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, parquet

from sftcli.data.conversations.messages import ROLES
from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.services.generate.prompt_file import read_prompts

ASKED = {"role": "user", "content": "And now?"}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def read(tmp_path):
    def run(row, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (prompt,) = read_prompts(path, system="", **options)
        return [(turn.role, turn.content) for turn in prompt.messages]

    return run


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("history", {"instruction": "Shorter.", "history": [["Long?", "Rain."]]}),
        ("chat_template_kwargs", {"messages": [ASKED], "chat_template_kwargs": {"enable_thinking": False}}),
        ("images", {"prompt": "What is this?", "images": ["a.png"]}),
        ("tools", {"messages": [ASKED], "tools": [{"name": "f"}]}),
        ("context", {"question": "How long?", "context": "The bridge is 40 m long."}),
        ("input", {"prompt": "Translate.", "input": "Hallo"}),
        ("context", {"instruction": "Compare.", "input": "This", "context": "That"}),
        ("reasoning", {"messages": [*EARLIER, ASKED | {"reasoning": "Hm."}]}),
        ("tools", {"messages": [{"role": "system", "content": "Help.", "tools": [{"name": "f"}]}, ASKED]}),
    ],
)
def test_row_that_asks_something_that_is_not_read_is_refused_and_asked_without_it(read, key, row):
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.message.startswith(f'"{key}"')
    assert caught.value.location.line == 1
    assert caught.value.hint.endswith(f"--ignore {key}")
    assert read(row, ignored=[key])


def test_calls_of_tools_are_refused(read):
    with pytest.raises(DataError, match='"tool_calls" of turns is not read'):
        read({"messages": [EARLIER[0], EARLIER[1] | {"tool_calls": [{"name": "f"}]}, ASKED]})


@pytest.mark.parametrize(
    "keys",
    [
        {"weight": 0, "train": False},
        {"label": False},
        {"tools": [], "history": None, "images": [], "context": ""},
        {"id": 3, "answer": "Yes", "reasoning": "Hm.", "completion": "No"},
    ],
)
def test_what_is_said_of_answers_and_training_changes_no_prompt(read, keys):
    assert read({"prompt": "Hi", **keys}) == [("user", "Hi")]
    marked = EARLIER[1] | {key: keys[key] for key in keys if key in ("weight", "train")}
    assert read({"messages": [EARLIER[0], marked, ASKED, EARLIER[1]], **keys})[1:] == [
        ("assistant", "Hello"),
        ("user", "And now?"),
    ]


def test_system_texts_and_what_a_prompt_is_about_are_read_as_in_training(read):
    assert read(
        {"instruction": "How long?", "context": "The bridge is 40 m long.", "system_prompt": "Be brief."}
    ) == [
        ("system", "Be brief."),
        ("user", "How long?\n\nThe bridge is 40 m long."),
    ]
    assert read({"messages": [ASKED], "system": "Be brief."}) == [
        ("system", "Be brief."),
        ("user", "And now?"),
    ]


TEXTS = ['Say "a, b".', "Two\nlines", "Grüße", "  spaces  "]


def write_csv(path, rows, **dialect):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt"], **dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": partial(write_csv, delimiter="\t"),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "a.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "a.jsonl.gz": write_gz,
    "a.parquet": lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "a.feather": lambda path, rows: feather.write_feather(pyarrow.Table.from_pylist(rows), str(path)),
    "a.yaml": lambda path, rows: path.write_text("".join(f"- {json.dumps(row)}\n" for row in rows)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_that_training_reads_holds_prompts(tmp_path, name):
    rows = [{"id": str(number), "prompt": text} for number, text in enumerate(TEXTS)]
    WRITERS[name](tmp_path / name, rows)
    found = read_prompts(tmp_path / name, system="Be brief.")
    assert [[(turn.role, turn.content) for turn in prompt.messages] for prompt in found] == [
        [("system", "Be brief."), ("user", text)] for text in TEXTS
    ]
    assert [dict(prompt.row) for prompt in found] == rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*EARLIER, ASKED, EARLIER[1]]},
        {"messages": json.dumps([*EARLIER, ASKED])},
        {"prompt": [*EARLIER, ASKED], "completion": [EARLIER[1]]},
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "And now?"},
                {"from": "gpt", "value": "Rain."},
            ]
        },
        {"prompt": "And now?", "messages": [*EARLIER, ASKED]},
    ],
)
def test_turns_are_read_as_training_reads_them(read, row):
    assert read(row) == [("user", "Hi"), ("assistant", "Hello"), ("user", "And now?")]


def test_a_pair_of_texts_is_asked_by_its_first(read):
    assert read({"input": "Hallo", "output": "Hello"}) == [("user", "Hallo")]
    assert read({"question": "Why?", "response": "So."}) == [("user", "Why?")]


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("question", {"prompt": "Hi", "question": "Why?"}),
        ("prompt", {"messages": [ASKED], "prompt": "Something else"}),
        ("instances", {"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]}),
    ],
)
def test_a_second_text_to_be_asked_is_refused(read, key, row):
    with pytest.raises(DataError, match=f'"{key}" is not read in files of prompts'):
        read(row)


def test_a_column_of_any_name_is_mapped_and_told_where_it_is_not(read, tmp_path):
    row = {"id": "3", "mail": "Where is it?"}
    with pytest.raises(DataError, match="no column holds a prompt; there are id, mail") as caught:
        read(row)
    assert caught.value.hint == "name the one that is asked: --map prompt=mail"
    assert read(row, renames=["prompt=mail"]) == [("user", "Where is it?")]
    with pytest.raises(UsageError, match="no row has the column 'mial'"):
        read(row, renames=["prompt=mial"])


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf{one}\r\n\r\n  two\n")
    found = read_prompts(path, system="")
    assert [(prompt.line, prompt.row) for prompt in found] == [
        (1, {"prompt": "{one}"}),
        (3, {"prompt": "  two"}),
    ]


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    for name in ("a.docx", "a.md", "a.pdf.gz"):
        (tmp_path / name).write_text("What is this?\n")
        with pytest.raises(DataError, match="rows cannot be read from a"):
            read_prompts(tmp_path / name, system="")
    (tmp_path / "bare").write_text("What is this?\n")
    with pytest.raises(DataError, match="JSON"):
        read_prompts(tmp_path / "bare", system="")
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "folder" / name).write_text("Hi\n")
    with pytest.raises(UsageError, match="several files"):
        read_prompts(tmp_path / "folder", system="")
    with pytest.raises(NotFoundError, match="no file 'nosuch/rows'"):
        read_prompts(Path("nosuch/rows"), system="")


@pytest.mark.parametrize("role", sorted(name for name, meant in ROLES.items() if meant == "assistant"))
def test_an_answer_under_any_of_its_names_is_asked_for_again(read, role):
    assert read({"messages": [ASKED, {"role": role.upper(), "content": "No."}]}) == [("user", "And now?")]
