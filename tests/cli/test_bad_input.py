"""Bad input gets one message that says where and what to do, a published exit code, and no traceback."""

import json
import re
from pathlib import Path

import pytest


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_missing_file_names_it_and_the_nearest(sft, rows):
    code, out, err = sft("prepare", "row.jsonl")
    assert (code, out) == (66, "")
    assert "row.jsonl" in err
    assert "rows.jsonl" in err


def test_broken_line_is_named_with_a_caret(sft, tiny_model):
    broken = write("broken.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion" "b"}\n')
    code, _, err = sft("prepare", broken, "--model", tiny_model)
    assert code == 65
    assert "broken.jsonl:2" in err
    assert "^" in err


def test_mixed_formats_are_named_with_both_places(sft, tiny_model):
    mixed = write("mixed.jsonl", '{"prompt": "a", "completion": "b"}\n{"question": "a", "answer": "b"}\n')
    code, _, err = sft("prepare", mixed, "--model", tiny_model)
    assert code == 65
    assert "mixed.jsonl:1" in err
    assert "mixed.jsonl:2" in err


def test_file_without_a_row_to_train_on_is_refused(sft, tiny_model):
    empty = write("empty.jsonl", '{"prompt": "a", "completion": ""}\n')
    code, _, err = sft("train", "--data", empty, "--model", tiny_model)
    assert code == 65
    assert "the only row was rejected" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "--preset", "qick"], "'quick'"),
        (["train", "--set", "training.learning_rte=1"], "'training.learning_rate'"),
        (["trian"], "train"),
        (["train", "--max-step", "3"], "--max-steps"),
    ],
)
def test_typing_error_gets_the_nearest_name(sft, arguments, word):
    code, out, err = sft(*arguments)
    assert (code, out) == (2, "")
    assert word in err


def test_unknown_key_in_a_file_is_named_with_its_line(sft):
    config = write("my.toml", "[training]\nmax_steps = 3\nlearning_rte = 1e-4\n")
    code, _, err = sft("train", "--config", config)
    assert code == 2
    assert "my.toml:3" in err


def test_settings_without_data_say_how_to_name_some(sft, tiny_model):
    code, _, err = sft("train", "--config", write("my.toml", f"[model]\nname = '{tiny_model}'\n"))
    assert code == 2
    assert "--data" in err


def test_unknown_model_is_an_input_that_is_not_there(sft, rows):
    code, _, err = sft("train", "--data", rows, "--model", "smollm2-135n")
    assert code == 66
    assert "smollm2-135m" in err


def test_taken_run_name_says_how_to_go_on(sft, rows, tiny_model):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/notes.txt").touch()  # an empty folder is free: a start that was killed at once leaves one
    code, _, err = sft("train", "--data", rows, "--model", tiny_model, "--run", "mine")
    assert code == 73
    assert "--run" in err


@pytest.mark.parametrize("arguments", [["resume"], ["resume", "exp1"], ["generate", "hello"], ["eval"]])
def test_command_that_needs_a_run_says_that_there_is_none(sft, arguments):
    code, out, err = sft(*arguments)
    assert (code, out) == (66, "")
    assert "run" in err


def test_misspelled_run_gets_the_nearest(sft):
    Path("runs/exp01").mkdir(parents=True)
    Path("runs/exp01/run.json").write_text("{}", encoding="utf-8")
    code, _, err = sft("resume", "exp1")
    assert code == 66
    assert "'exp01'" in err


def test_empty_prompt_is_refused(sft, tiny_model):
    code, _, err = sft("generate", "  ", "--checkpoint", tiny_model)
    assert code == 2
    assert "empty" in err


def test_model_without_a_run_needs_rows_to_be_scored_on(sft, tiny_model):
    code, _, err = sft("eval", tiny_model)
    assert code == 2
    assert "--data" in err


def test_failure_as_json_is_one_object_on_stdout(sft):
    code, out, _ = sft("train", "--preset", "qick", "--json")
    failure = json.loads(out)
    assert code == failure["exit_code"] == 2
    assert failure["ok"] is False
    assert "quick" in failure["error"]["message"] + failure["error"]["hint"]


def test_name_of_a_run_that_never_began_is_free_for_the_right_command(sft, rows, flags):
    wrong = sft("train", "--data", "rws.jsonl", *flags, "--run", "mine")
    right = sft("train", "--data", rows, *flags, "--run", "mine")
    again = sft("train", "--data", rows, *flags, "--run", "mine")
    assert [wrong[0], right[0], again[0]] == [66, 0, 73]


def test_run_without_a_name_that_never_began_leaves_no_folder(sft, rows, tiny_model):
    rows.write_text('{"x": 1}\n', encoding="utf-8")
    code, _, err = sft("train", "--data", rows, "--model", tiny_model)
    assert code == 65
    assert re.search(r"removed \S+: the run ended before its first step", err)
    assert list((rows.parent / "runs").iterdir()) == []


def test_wrong_name_of_rows_is_told_before_torch_is_loaded_and_a_run_is_made(sft, rows, tiny_model):
    code, _, err = sft("train", "--data", "rws.jsonl", "--model", tiny_model)
    assert code == 66
    assert "did you mean 'rows.jsonl'?" in err
    assert "loading" not in err
    assert not (rows.parent / "runs").exists()


def test_run_with_a_name_that_never_began_keeps_its_log(sft, rows, tiny_model):
    rows.write_text('{"x": 1}\n', encoding="utf-8")
    sft("train", "--data", rows, "--model", tiny_model, "--run", "mine")
    assert (rows.parent / "runs" / "mine" / "training.log").is_file()
