"""What a model has no room for is told before an answer is begun: in every way that it is asked."""

import io
import json
from pathlib import Path

import pytest

from tests.cli.conftest import write_sums

LONG = "word " * 600
NEARLY = "word " * 140


def test_a_prompt_that_is_too_long_is_refused_with_both_lengths(sft, tiny_model):
    code, _, err = sft("generate", LONG, "-c", tiny_model)
    assert code == 65
    assert "tokens, and the model was made for 512 positions" in err


@pytest.mark.parametrize(("size", "wanted"), [(100, 0), (101, 65)])
def test_a_prompt_on_standard_input_is_read_up_to_its_limit(sft, tiny_model, monkeypatch, size, wanted):
    monkeypatch.setattr("sftcli.cli.commands.generate.MAX_PROMPT_CHARS", 100)
    monkeypatch.setattr("sys.stdin", io.StringIO("é" * size))
    code, out, err = sft("generate", "-", "-c", tiny_model, "--max-new-tokens", 2)
    assert code == wanted, err
    assert ("more than 100 characters" in err) == bool(wanted)
    assert wanted == 0 or out == ""


def test_less_room_than_asked_for_is_told_and_is_where_the_answer_ends(sft, tiny_model):
    code, _, err = sft("generate", NEARLY, "-c", tiny_model, "--max-new-tokens", 400)
    assert code == 0, err
    assert "not 400: the longest prompt has" in err
    assert "and the model was made for 512 positions" in err


def test_a_file_names_the_rows_that_are_too_long_before_it_answers_any(sft, tiny_model, tmp_path):
    rows = [{"prompt": text} for text in ("one", LONG, "two", LONG)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, err = sft("generate", "--file", "prompts.jsonl", "--out", "out.jsonl", "-c", tiny_model)
    assert code == 65
    assert "2 prompts longer than the 512 positions" in err
    assert "line 2 (" in err and "line 4 (" in err  # noqa: PT018
    assert not Path("out.jsonl").exists()


def test_a_chat_says_that_the_conversation_is_too_long_and_goes_on(tiny_model):
    from tests.cli.test_generate import invoke

    lines = f"Hi\n{LONG}\nHi again\n"
    result = invoke("generate", "--chat", "-c", tiny_model, "--max-new-tokens", 2, text=lines)
    assert result.exit_code == 0
    assert "the conversation has" in result.stderr
    assert "/reset forgets it" in result.stderr


def test_held_out_rows_that_are_too_long_are_counted_and_not_answered(sft, tiny_model, tmp_path):
    path = write_sums(tmp_path / "rows.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": LONG, "answer": "Yes."}) + "\n")
    code, _, err = sft("train", "--data", path, "--model", tiny_model, "--run", "a", "--max-steps", 1,
                       "--set", "training.batch_size=2", "--max-tokens", 4096)  # fmt: skip
    assert code == 0, err
    code, _, err = sft("eval", "a", "--data", path, "--max-rows", 3, "--no-base")
    assert code == 0, err
    assert "held-out rows that are longer than the 512 positions that the model was made for" in err


@pytest.mark.parametrize("number", ["1" + "0" * 23, "99999999"])
def test_counts_beyond_sense_are_refused_by_name(sft, tiny_model, number):
    for flag in ("--max-new-tokens", "--samples"):
        code, _, err = sft("generate", "Hi", "-c", tiny_model, flag, number)
        assert code == 2
        assert flag in err
