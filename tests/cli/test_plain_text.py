"""Plain text that is prepared to be mixed into training."""

import json
from itertools import pairwise
from pathlib import Path

from sftcli.data.prepared.store import open_prepared


def write_texts(*texts: str) -> str:
    lines = [json.dumps({"text": text}) for text in texts]
    Path("texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "data.text_sources=texts.jsonl"


def test_every_token_of_a_text_is_predicted_once_however_long_it_is(sft, rows, tiny_model):
    sources = write_texts("The ferry leaves at seven. " * 40, "Short.")
    limit = ("--max-tokens", "32", "--set", sources, "--set", "data.text_fraction=0.1")
    code, out, _ = sft("prepare", rows, "--model", tiny_model, *limit, "--json")
    about = json.loads(out)
    pieces = open_prepared(Path(about["folder"])).text
    examples = [pieces[index] for index in range(len(pieces))]
    assert code == 0
    assert {example.kind for example in examples} == {"text"}
    assert max(pieces.num_tokens) == 32
    assert all(example.loss_mask[1:].all() for example in examples)
    long = [example for example in examples if example.origin.line == 1]
    joined = [*long[0].input_ids, *(token for piece in long[1:] for token in piece.input_ids[1:])]
    for before, after in pairwise(long):
        assert before.input_ids[-1] == after.input_ids[0]
        assert not after.loss_mask[0]
    assert joined[-1] == long[-1].input_ids[-1] == examples[-1].input_ids[-1]  # the stop token
    (note,) = (note for note in about["audit"]["text"]["notes"] if "longer than" in note)
    assert (
        note
        == f"1 of 2 texts are longer than 32 tokens and became {len(long)} rows; nothing of them was left out"
    )
    assert about["audit"]["text"]["rows"] == len(examples)


LONG = " ".join(
    f"Ferry {number} leaves pier {number * 7} unless fog {number * 13} holds it." for number in range(30)
)


def test_texts_as_rows_are_trained_whole_with_a_warning(sft, tiny_model):
    write_texts(LONG, "Short.")
    ask = ("prepare", "texts.jsonl", "--model", tiny_model, "--max-tokens", "32", "--json")
    code, out, err = sft(*ask)
    about = json.loads(out)
    assert code == 0
    assert "texts.jsonl: rows of pretraining text, every token of which is trained" in err
    assert "--as-text" in err
    rows = open_prepared(Path(about["folder"])).train
    pieces = [rows[index] for index in range(len(rows))]
    assert {piece.kind for piece in pieces} == {"text"}
    assert max(rows.num_tokens) == 32
    long = [piece for piece in pieces if piece.origin.line == 1]
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in pairwise(long))
    audit = about["audit"]["train"]
    assert (audit["rejected"], audit["flags"]["split-text"]) == ({}, len(long))
    assert (audit["duplicate_rows"], audit["near_duplicate_rows"]) == (0, 0)
    code, again, err = sft(*ask, "--as-text")
    assert code == 0
    assert "pretraining text" not in err
    assert json.loads(again)["folder"] == about["folder"]


def test_a_plain_text_file_is_a_text(sft, tiny_model):
    Path("book.txt").write_text(LONG, encoding="utf-8")
    code, _, err = sft("prepare", "book.txt", "--model", tiny_model, "--as-text", "--max-tokens", "9999")
    assert code == 0
    assert "book.txt: plain text, one text" in err
    assert "1 of 1 rows" in err


def test_texts_with_chat_markup_stay_refused(sft, tiny_model):
    write_texts("Short.", "<|im_start|>user\nIs it foggy?<|im_end|>")
    code, _, err = sft("prepare", "texts.jsonl", "--model", tiny_model, "--as-text")
    assert code == 65
    assert "chat markup" in err


def test_conversations_are_refused_as_plain_text(sft, rows, tiny_model):
    code, out, err = sft("prepare", rows, "--model", tiny_model, "--set", f"data.text_sources={rows}")
    assert (code, out) == (65, "")
    assert "rows.jsonl:1 is a conversation, expected pretraining text" in err


def test_share_of_plain_text_without_any_is_refused(sft, rows, tiny_model):
    code, _, err = sft("prepare", rows, "--model", tiny_model, "--set", "data.text_fraction=0.1")
    assert code == 2
    assert "data.text_sources=" in err


def test_plain_text_with_a_share_of_zero_is_told_to_be_unused(sft, rows, tiny_model):
    code, _, err = sft("prepare", rows, "--model", tiny_model, "--set", write_texts("Some text."))
    assert code == 0
    assert "data.text_fraction is 0" in err
