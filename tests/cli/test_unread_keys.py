"""Rows that say something that is not read are refused by every command that trains or scores."""

import json
from pathlib import Path

import pytest

TURNS = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}]
ROWS = {
    "images": {"messages": [TURNS[0] | {"images": ["wall.png"]}, TURNS[1]]},
    "train": {"prompt": "Name a fruit.", "completion": "Brick.", "train": False},
    "chat markup": {"text": "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\nA pear."},
}


def write(*rows: dict[str, object], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.mark.parametrize("key", ROWS)
@pytest.mark.parametrize("strict", [(), ("--strict",)], ids=["", "strict"])
def test_prepare_refuses_the_rows_by_name_and_keeps_nothing(sft, tiny_model, key, strict):
    code, out, err = sft("prepare", write(ROWS[key]), "--model", tiny_model, *strict)
    assert (code, out, list(Path("cache/prepared").glob("*"))) == (65, "", [])
    assert key in err
    code, out, _ = sft("prepare", "rows.jsonl", "--model", tiny_model, "--json", *strict)
    assert code == 65
    assert key in json.loads(out)["error"]["message"]


def test_train_refuses_the_rows_before_it_begins_a_run(sft, tiny_model):
    code, _, err = sft("train", "--data", write(ROWS["train"]), "--model", tiny_model, "--max-steps", "1")
    assert code == 65
    assert '"train" is not read' in err
    assert not list(Path("runs").glob("*"))


def test_what_is_dropped_on_purpose_is_said_and_is_another_store(sft, tiny_model):
    data = ("prepare", write(*[ROWS["images"]] * 4), "--model", tiny_model, "--json")
    dropping = json.loads(sft(*data, "--ignore", "images")[1])
    assert dropping["schemas"]["rows.jsonl"].endswith("dropped on purpose: images")
    assert sft(*data)[0] == 65


def test_running_text_may_hold_control_tokens_where_that_is_allowed(sft, tiny_model):
    allowed = ("--set", "data.allow_control_text=true", "--set", "data.heldout_fraction=0", "--json")
    code, out, _ = sft("prepare", write(ROWS["chat markup"]), "--model", tiny_model, *allowed)
    assert code == 0
    assert json.loads(out)["audit"]["train"]["flags"] == {"control-text": 1}


def test_eval_refuses_the_rows_too_and_takes_the_flag_of_the_help(sft, tiny_model):
    score = ("eval", tiny_model, "--no-base", "--json", "--data", write(ROWS["images"]))
    code, out, _ = sft(*score)
    assert code == 65
    flags = json.loads(out)["error"]["hint"].rpartition(": ")[2].split()
    assert sft(*score, *flags)[0] == 0
