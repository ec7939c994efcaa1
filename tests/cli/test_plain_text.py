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
