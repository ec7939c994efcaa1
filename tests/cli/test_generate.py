"""``sft generate``: files that resume, samples, the base beside the tuned model, and a conversation."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.config.schema.settings import Settings
from sftcli.services.generate.answerer import AnswerText
from sftcli.services.models.reference import find_model
from sftcli.services.runs.folder import find_run
from sftcli.services.runs.lock import OutputLock
from tests.support.chat import family_tokenizer


def invoke(*arguments: object, text: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "word " * (number % 5 + 1), "id": number} for number in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_file(prompts: Path, out: Path, model: Path, *more: object):
    result = invoke("generate", "--file", prompts, "--out", out, "-c", model, "--max-new-tokens", 6, *more)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_file_is_answered_in_its_own_order(prompts, tiny_model, tmp_path):
    rows = answer_file(prompts, tmp_path / "out.jsonl", tiny_model)
    assert [row["id"] for row in rows] == list(range(12))
    assert [row["line"] for row in rows] == list(range(1, 13))
    assert all(row["finish"] in {"stop", "length"} for row in rows)
    assert not (tmp_path / ".out.jsonl.partial").exists()


def test_columns_of_the_rows_keep_their_place_and_none_is_lost(tiny_model, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("line,question,answer\nL1,What?,Yes\nL2,Why?,No\n")
    result = invoke("generate", "--file", path, "--out", tmp_path / "out.jsonl", "-c", tiny_model,
                    "--max-new-tokens", 6)  # fmt: skip
    assert "line as row_line, answer as row_answer" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == 2 * [
        [
            "line",
            "row_line",
            "question",
            "row_answer",
            "answer",
            "finish",
            "confidence",
            "logprob",
            "new_tokens",
        ]
    ]
    assert [(row["line"], row["row_line"], row["row_answer"]) for row in rows] == [
        (2, "L1", "Yes"), (3, "L2", "No"),
    ]  # fmt: skip
    path.write_text("question,answer,row_answer\nWhat?,Yes,No\n")
    result = invoke("generate", "--file", path, "--out", tmp_path / "more.jsonl", "-c", tiny_model)
    assert result.exception.exit_code == 65
    assert not (tmp_path / "more.jsonl").exists()


def test_a_file_that_was_cut_goes_on_to_the_same_answers(prompts, tiny_model, tmp_path):
    sampled = ("--temperature", "1", "--seed", "5")
    whole = answer_file(prompts, tmp_path / "whole.jsonl", tiny_model, *sampled)
    # What a kill leaves behind: a journal with some answers, its last line torn.
    from sftcli.services.generate import file as generate_file

    kept: list[str] = []
    close = generate_file.Journal.close

    def keep(journal):
        close(journal)
        kept.append(journal.path.read_text(encoding="utf-8"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_file.Journal, "close", keep)
        answer_file(prompts, tmp_path / "first.jsonl", tiny_model, *sampled)
    lines = kept[0].split("\n")
    (tmp_path / ".cut.jsonl.partial").write_text("\n".join([*lines[:5], lines[5][:20]]), encoding="utf-8")
    result = invoke("generate", "--file", prompts, "--out", tmp_path / "cut.jsonl", "-c", tiny_model,
                    "--max-new-tokens", 6, *sampled, "--json")  # fmt: skip
    assert (json.loads(result.stdout)["kept"], json.loads(result.stdout)["answered"]) == (4, 8)
    resumed = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    # Its last digit may depend on the rows beside it, and those are fewer now.
    for row, expected in zip(resumed, whole, strict=True):
        assert row.pop("logprob") == pytest.approx(expected.pop("logprob"), abs=2e-4)
        assert row.pop("confidence") == pytest.approx(expected.pop("confidence"), abs=2e-5)
    assert resumed == whole


def test_a_file_begun_with_other_settings_is_not_mixed(prompts, tiny_model, tmp_path):
    (tmp_path / ".out.jsonl.partial").write_text('{"answers": "other"}\n', encoding="utf-8")
    result = invoke("generate", "--file", prompts, "--out", tmp_path / "out.jsonl", "-c", tiny_model)
    assert result.exception.exit_code == 78


def test_of_two_that_answer_into_one_file_one_answers_and_the_other_says_so(prompts, tiny_model, tmp_path):
    out = tmp_path / "out.jsonl"
    with OutputLock(out):
        result = invoke("generate", "--file", prompts, "--out", out, "-c", tiny_model, "--max-new-tokens", 2)
    error = result.exception
    assert (error.exit_code, out.exists()) == (73, False)
    assert f"{out} is in use by pid {os.getpid()}" in error.message
    answer_file(prompts, out, tiny_model)
    assert not list(tmp_path.glob(".*"))


def test_a_run_below_the_home_folder_is_found_behind_an_equals_sign(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "runs" / "mine"
    (run / "final").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "final" / "config.json").write_text("{}")
    for name in ("~/runs/mine", "~/runs/mine/final"):
        found = find_model(name, root=tmp_path / "elsewhere")
        assert (found.run.path, found.folder) == (run, run / "final")
    assert find_run("~/runs/mine", tmp_path / "elsewhere").path == run
    assert Settings(run={"root": "~/runs"}).run.root == str(tmp_path / "runs")
    result = invoke("show", "mine", "--runs=~/runs")
    assert "no run" not in str(result.exception)


def test_a_line_that_is_no_prompt_is_named(tiny_model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"color": 1}\n', encoding="utf-8")
    error = invoke("generate", "--file", path, "--out", tmp_path / "out.jsonl", "-c", tiny_model).exception
    assert (error.exit_code, str(error.location)) == (65, f"{path}:2")


def test_several_samples_differ_and_repeat_with_their_seed(tiny_model):
    def texts():
        out = invoke(
            "generate",
            "hello",
            "-c",
            tiny_model,
            "-n",
            3,
            "--temperature",
            1,
            "--max-new-tokens",
            8,
            "--json",
        )
        return [completion["text"] for completion in json.loads(out.stdout)["completions"]]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_chat_remembers_and_saves_what_was_said(tiny_model, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = f"/system Be brief.\nhello\nagain\n/save {saved}\n/reset\nonce\n/save {saved}\n/quit\nnever\n"
    result = invoke("generate", "--chat", "-c", tiny_model, "--max-new-tokens", 4, text=lines)
    assert result.exit_code == 0, result.exception
    roles = [
        [turn["role"] for turn in json.loads(line)["messages"]] for line in saved.read_text().splitlines()
    ]
    assert roles == [["system", "user", "assistant", "user", "assistant"], ["system", "user", "assistant"]]


def test_a_stop_text_is_not_part_of_the_text_and_its_beginning_is_held_back():
    tokenizer = family_tokenizer("chatml")
    text = AnswerText(tokenizer, ("END",))
    pieces = [text.push(token) for token in tokenizer.encode("one E two END three")]
    assert text.is_over
    assert "".join([*pieces, text.close()]) == text.text == "one E two "


def test_pieces_of_text_hold_whole_characters_only():
    tokenizer = family_tokenizer("chatml")
    text = AnswerText(tokenizer)
    pieces = [text.push(token) for token in tokenizer.encode("naïve ☃ 你好 🙂 end")]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join([*pieces, text.close()]) == "naïve ☃ 你好 🙂 end"


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "--chat"], ["--file", "x"], ["--chat", "--json"]],
    ids=["none", "two", "no-out", "json"],
)
def test_combinations_that_mean_nothing_are_refused(arguments):
    assert invoke("generate", *arguments).exception.exit_code == 2


def test_a_template_that_is_not_that_of_training_is_warned_about(rows, flags, tmp_path, tiny_model):
    assert invoke("train", "--data", rows, "--run", "first", *flags).exit_code == 0
    ask = ("generate", "hello", "-c", "first", "--runs", tmp_path / "runs", "--max-new-tokens", 2)
    assert "warning" not in invoke(*ask).stderr
    template = tmp_path / "runs" / "first" / "final" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "changed", encoding="utf-8")
    assert "differ from those the model was trained with" in invoke(*ask).stderr
