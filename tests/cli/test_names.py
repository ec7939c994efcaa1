"""Names and texts that are not UTF-8: refused by name, or read; never written half, never a bug."""

import io
import json
import os
import re
from pathlib import Path

import pytest

from sftcli.cli import app
from sftcli.data.reading.source import parse_source

LATIN = os.fsdecode(b"r\xe9ponses.jsonl")
ROW = '{"prompt": "Capital of Peru?", "response": "Lima"}\n'
LONE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def latin_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / LATIN
    try:
        path.write_text(ROW, "utf-8")
    except OSError:
        pytest.skip("this file system takes no name that is not UTF-8")
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("prepare", LATIN),
        ("train", "--data", LATIN),
        ("prepare", "rows.jsonl", "--out", LATIN),
        ("train", "--run", "r\udce9"),
        ("generate", "caf\udce9"),
        ("train", "--model", "m\udce9"),
        ("export", "--to", "hf", "r\udce9"),
        ("train", "--set", "data.template=\udce9"),
    ],
)
def test_a_word_that_is_not_utf8_is_refused_by_name(sft, words):
    latin_file(Path())
    code, out, _ = sft(*words, "--json")
    error = json.loads(out)["error"]
    assert code == 2
    assert "not UTF-8" in error["message"]
    assert "\\udce9" in error["message"]
    assert not LONE.search(out.replace("\\\\", ""))
    assert sorted(path.name for path in Path().iterdir() if not path.name.startswith(".")) == [LATIN]


def test_a_folder_with_such_a_file_is_read_and_rows_are_named_in_letters(sft, tiny_model):
    latin_file(Path("rows"))
    (Path("rows") / os.fsdecode(b"n\xf6tes.txt")).write_text("x", "utf-8")
    flags = ("--model", tiny_model, "--set", "data.heldout_fraction=0", "--show", 1, "--json")
    code, out, _ = sft("prepare", "rows", *flags)
    assert code == 0
    assert json.loads(out)["shown"][0]["origin"] == "rows/r\\xe9ponses.jsonl:1"
    assert not LONE.search(out.replace("\\\\", ""))
    code, _, err = sft("train", "--data", "rows", "--model", tiny_model, "--max-steps", 1, "--run", "r")
    assert code == 0
    assert "n\\xf6tes.txt" in err


def test_a_mistyped_name_beside_such_a_file_is_answered(sft):
    latin_file(Path())
    code, _, err = sft("prepare", "rponses.jsonl")
    assert code == 66
    assert "xe9ponses.jsonl" in err


def test_a_folder_in_which_one_works_and_a_setting_of_the_shell_are_named(sft, monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_DATA__TEMPLATE", "\udce9")
    assert (sft("runs")[0], "SFT_DATA__TEMPLATE" in sft("runs")[2]) == (2, True)
    monkeypatch.delenv("SFT_DATA__TEMPLATE")
    odd = tmp_path / "w\udce9"
    odd.mkdir()
    monkeypatch.chdir(odd)
    code, _, err = sft("runs")
    assert code == 2
    assert "current folder is not UTF-8" in err


def test_words_of_the_c_locale_are_those_that_were_typed(monkeypatch):
    app._check_words(["gr\udcc3\udcbc\udcc3\udc9fe"])  # "grüße" where Python knows ASCII only


def test_other_letters_work(sft, tiny_model):
    name = "réponses 東京 🦆.jsonl"
    Path(name).write_text(ROW, "utf-8")
    assert parse_source(name).label(Path(name)) == name
    assert sft("prepare", name, "--model", tiny_model)[0] == 0


def test_a_lone_surrogate_in_a_column_s_name_is_refused_with_its_line(sft, tiny_model):
    Path("rows.jsonl").write_text(ROW + ROW.replace("}", ', "\\udfff": 1}'), "utf-8")
    code, _, err = sft("prepare", "rows.jsonl", "--model", tiny_model)
    assert code == 65
    assert "rows.jsonl:2" in err
    assert "\\udfff" in err


@pytest.mark.parametrize(
    "row", ['{"prompt": "a", "x": "\\udfff"}', '"\\ud83d"', '{"\\udc00": 1, "prompt": "a"}', "[" * 100_000]
)
def test_a_prompt_row_that_cannot_be_written_back_is_refused_before_any_answer(sft, tiny_model, row):
    Path("prompts.jsonl").write_text(f'{{"prompt": "b"}}\n{row}\n', "utf-8")
    code, _, err = sft("generate", "-c", tiny_model, "--file", "prompts.jsonl", "--out", "answers.jsonl")
    assert code == 65
    assert "prompts.jsonl:2" in err
    assert [path.name for path in Path().iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature", "1e-300"),
        ("--temperature", "1", "--top-p", "1e-320"),
        ("--temperature", "1e-7", "--min-p", "1"),
    ],
)
def test_the_coldest_draws_are_the_most_likely_token(sft, tiny_model, flags):
    asked = ("generate", "Hi", "-c", tiny_model, "--max-new-tokens", 4)
    assert sft(*asked, *flags)[:2] == sft(*asked, "--temperature", "0")[:2]


def test_running_text_is_not_scored_as_answers(sft, tiny_model):
    Path("text.jsonl").write_text('{"text": "The ferry leaves at seven."}\n', "utf-8")
    code, _, err = sft("eval", tiny_model, "--data", "text.jsonl")
    assert code == 65
    assert "pretraining text" in err


@pytest.mark.parametrize("flags", [("-",), ("--chat",)])
def test_bytes_on_standard_input_that_are_not_utf8_are_refused(sft, tiny_model, monkeypatch, flags):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/save \xff\n"), encoding="utf-8"))
    code, _, err = sft("generate", *flags, "-c", tiny_model)
    assert code == 65
    assert "not UTF-8" in err
    assert not list(Path().iterdir())


def test_what_became_of_the_keys_of_another_trainer_is_told_before_anything_is_trained(sft, tmp_path):
    theirs = tmp_path / "lf.yaml"
    theirs.write_text("stage: sft\ntemplate: qwen\nsave_strategy: epoch\n", encoding="utf-8")
    code, out, err = sft("train", "--config", theirs, "--print-config")
    assert code == 0
    assert "data.template" in out
    assert "template (the model's own chat template is used" in err
    assert "save_strategy (checkpoints are saved as checkpoint.every_minutes says" in err
    assert sft("train", "--config", theirs, "--print-config", "--json")[0] == 0
