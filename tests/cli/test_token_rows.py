"""Rows of token ids are trained as they are, and told by what no text proves."""

import json
from pathlib import Path

import pytest

from sftcli.data.prepared.store import open_prepared

ROWS = [
    {"input_ids": [1, 40 + n, 41, 42, 43], "labels": [-100, -100, -100, 42, 43], "attention_mask": [1] * 5}
    for n in range(12)
]


def write(rows):
    Path("ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def prepare(sft, model, *options):
    code, out, err = sft("prepare", "ids.jsonl", "--model", model, "--json", *options)
    return code, json.loads(out) if out else {}, err


@pytest.mark.parametrize("fraction", ["0", "0.25"])
def test_they_are_stored_as_they_are(sft, tiny_model, fraction):
    write(ROWS)
    code, about, err = prepare(sft, tiny_model, "--set", f"data.heldout_fraction={fraction}")
    assert (code, err.count("pretraining text")) == (0, 0)
    data = open_prepared(Path(about["folder"]))
    examples = [side[index] for side in (data.train, data.heldout) for index in range(len(side))]
    assert sorted(example.input_ids.tolist() for example in examples) == [row["input_ids"] for row in ROWS]
    assert all(example.loss_mask.tolist() == [False, False, False, True, True] for example in examples)
    assert {example.kind for example in examples} == {"conversation"}
    assert len(data.heldout) == 12 * float(fraction)
    assert about["audit"]["train"]["duplicate_rows"] == 0


def test_ids_beyond_the_vocabulary_are_rejected_by_name(sft, tiny_model):
    write([*ROWS, {"input_ids": [1, 999_999, 2], "labels": [-100, 999_999, 2]}])
    code, about, _ = prepare(sft, tiny_model)
    assert code == 0
    (row,) = about["audit"]["train"]["rejected_rows"]["wrong-type"]
    assert "ids.jsonl:13" in row
    assert "the token 999999 is not in the vocabulary" in row


def test_longer_rows_are_rejected_or_cut(sft, tiny_model):
    long = {"input_ids": [1, *range(30, 50)], "loss_mask": [0] * 4 + [1] * 17}
    write([*ROWS, long])
    _, about, _ = prepare(sft, tiny_model, "--max-tokens", "8", "--set", "data.heldout_fraction=0")
    assert about["audit"]["train"]["rejected"] == {"too-long": 1}
    _, about, _ = prepare(
        sft, tiny_model, "--max-tokens", "8", "--set", "data.heldout_fraction=0", "--overlong", "truncate"
    )
    assert about["audit"]["train"]["flags"] == {"cut-answer": 1}


def test_where_nothing_says_what_is_trained_all_is_with_a_warning(sft, tiny_model):
    write([{"input_ids": row["input_ids"]} for row in ROWS])
    code, about, err = prepare(sft, tiny_model)
    assert code == 0
    assert "every token of which is trained" in err
    assert about["audit"]["train"]["response_tokens"] == 12 * 4
