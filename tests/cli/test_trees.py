"""Trees of messages and traces of agents from their file to the store."""

import json
from pathlib import Path

from sftcli.data.prepared.store import open_prepared

TREES = [
    message
    for n in range(20)
    for message in (
        {"message_id": f"a{n}", "parent_id": None, "role": "prompter", "text": f"What is {n} + 1?", "lang": "en"},
        {"message_id": f"b{n}", "parent_id": f"a{n}", "role": "assistant", "text": "No idea.", "rank": 1},
        {"message_id": f"c{n}", "parent_id": f"a{n}", "role": "assistant", "text": f"{n + 1}.", "rank": 0},
    )
]  # fmt: skip


def write(rows):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_trees_are_one_conversation_each(sft, tiny_model):
    write(TREES)
    code, out, _ = sft("prepare", "rows.jsonl", "--model", tiny_model, "--json")
    about = json.loads(out)
    data = open_prepared(Path(about["folder"]))
    assert code == 0
    assert about["schemas"] == {"rows.jsonl": "messages rows (messages); not used: lang"}
    assert len(data.train) + len(data.heldout) == 20


def test_what_is_left_out_of_trees_is_told(sft, tiny_model):
    write(TREES)
    _, _, err = sft("prepare", "rows.jsonl", "--model", tiny_model)
    assert (
        "60 messages in 20 trees: a conversation each, along the best-ranked replies; left out: 20 messages"
        in err
    )


def test_a_sample_of_messages_is_refused(sft, tiny_model):
    write(TREES)
    code, _, err = sft("prepare", "rows.jsonl:30", "--model", tiny_model)
    assert code == 65
    assert "which is not there" in err
    assert "name the whole file" in err


def test_messages_are_read_as_other_rows_where_parents_are_ignored(sft, tiny_model):
    write(TREES)
    code, _, err = sft("prepare", "rows.jsonl", "--model", tiny_model, "--ignore", "parent_id")
    assert code == 65
    assert '"role" is not read' in err
