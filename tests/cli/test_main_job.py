"""The main job from end to end on a tiny model: prepare, train, resume, generate, eval."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.errors import MismatchError
from tests.cli.conftest import short_training, write_sums
from tests.support.runs import events_of

CONTENTS = {
    "checkpoints", "config.toml", "data.json", "events.jsonl", "final", "origins.json", "report.html", "run.json", "training.log",
}  # fmt: skip


def sft(*arguments: object) -> tuple[str, str]:
    """Run a command that must succeed; return stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a finished run, ``runs/first``, made once."""
    place = tmp_path_factory.mktemp("finished")
    write_sums(place / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(place / "cache"))
        sft("train", "--data", place / "rows.jsonl", "--run", "first", *short_training(tiny_model, place))
    return place


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of this test's own, with the rows that it was trained on in their place."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "first"


def test_train_leaves_exactly_a_run_folder_and_prints_the_final_model(rows, flags, tmp_path):
    out, err = sft("train", "--data", rows, "--run", "first", *flags)
    run = tmp_path / "runs" / "first"
    assert out == f"{run / 'final'}\n"
    assert {path.name for path in run.iterdir()} == CONTENTS
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert "held-out loss" in err


def test_held_out_loss_falls(run):
    losses = [event["loss"] for event in events_of(run, "HeldoutDone")]
    assert len(losses) == 2
    assert losses[-1] < losses[0]


def test_training_log_tells_the_story_in_plain_lines(run):
    log = (run / "training.log").read_text(encoding="utf-8")
    for line in ("Loading pretrained model from ", "Model: 0.0M parameters", "Training examples: ",
                 "Starting SFT for 4 steps", "step=4 loss=", " lr=", "SFT complete. Final checkpoint: "):  # fmt: skip
        assert line in log


def test_events_follow_their_grammar(run):
    kinds = [event["event"] for event in events_of(run)]
    order = [kind for kind in kinds if kind not in {"Notice", "Warned"}]
    assert order == [
        "RunStarted", "DataPrepared", "ModelLoaded", "HeldoutDone", "FitStarted",
        "StepDone", "StepDone", "StepDone", "StepDone", "HeldoutDone", "CheckpointSaved", "FitEnded", "ModelSaved",
    ]  # fmt: skip


def test_settings_in_the_run_folder_reproduce_the_run(run, tmp_path):
    place = f"run.root={tmp_path / 'runs'}"
    out, _ = sft("train", "--config", run / "config.toml", "--run", "second", "--set", place)
    again = tmp_path / "runs" / "second"
    assert out == f"{again / 'final'}\n"
    losses = [[event["loss"] for event in events_of(path, "StepDone")] for path in (run, again)]
    assert losses[0] == losses[1]


def test_generate_answers_with_the_newest_run_as_plain_transformers_would(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "What is 7 plus 7?"
    out, _ = sft("generate", prompt, "--runs", tmp_path / "runs", "--max-new-tokens", "8")
    model, tokenizer = (kind.from_pretrained(run / "final") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out.rstrip("\n") == tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n")


def test_generate_as_json_says_how_it_ended(run, tmp_path):
    out, _ = sft("generate", "Hello?", "--runs", tmp_path / "runs", "--max-new-tokens", "3", "--json")
    result = json.loads(out)
    assert result["ok"]
    assert result["new_tokens"] <= 3
    assert result["finish"] in {"stop", "length"}


def test_eval_scores_base_and_tuned_on_the_held_out_rows(run, tmp_path):
    out, _ = sft("eval", "first", "--runs", tmp_path / "runs", "--json")
    report = json.loads(out)
    last = [event["loss"] for event in events_of(run, "HeldoutDone")][-1]
    assert report["tuned"]["loss"] == pytest.approx(last, rel=2e-2)
    assert report["base"]["loss"] > report["tuned"]["loss"]
    assert report["rows"] == report["tuned"]["answered"] > 0


def test_eval_takes_a_checkpoint_folder_and_other_rows(run, rows, tmp_path):
    out, _ = sft("eval", run / "checkpoints" / "step-00000004", "--data", rows, "--no-base", "--json",
                 "--runs", tmp_path / "runs")  # fmt: skip
    report = json.loads(out)
    assert report["rows"] == 60
    assert report["base"] is None


def test_prepare_prints_the_folder_and_shows_rows(rows, tiny_model):
    out, _ = sft("prepare", rows, "--model", tiny_model, "--show", "1")
    assert "What is" in out
    assert (Path(out.splitlines()[-1]) / "manifest.json").is_file()


def test_second_prepare_of_the_same_rows_comes_from_the_cache(rows, tiny_model):
    first, second = (json.loads(sft("prepare", rows, "--model", tiny_model, "--json")[0]) for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["folder"] == second["folder"]


def test_resume_of_a_finished_run_changes_nothing(run, tmp_path):
    def state():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = state()
    out, err = sft("resume", "first", "--runs", tmp_path / "runs")
    assert out == f"{run / 'final'}\n"
    assert "complete already" in err
    assert state() == before


def test_resume_of_a_finished_run_with_other_settings_is_refused(run, tmp_path):
    with pytest.raises(MismatchError, match=r"training\.learning_rate was") as caught:
        sft("resume", "first", "--runs", tmp_path / "runs", "--set", "training.learning_rate=0.5")
    assert "--allow-change" not in caught.value.hint


def test_interrupted_run_saves_exits_130_and_resumes_to_the_same_weights(request, rows, flags, tmp_path):
    """That a process of its own ends with 130 on Ctrl-C is seen in ``test_terminal``; this one trains in here."""
    from safetensors.torch import load_file

    program = request.getfixturevalue("sft")  # the name is taken here
    long = [
        *flags,
        "--max-steps",
        "60",
        "--set",
        "training.learning_rate=1e-3",
        "--set",
        "training.log_every_steps=7",
    ]
    sft("train", "--data", rows, "--run", "whole", *long)
    cut = tmp_path / "runs" / "cut"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and '"StepDone"' not in (
            (cut / "events.jsonl").read_text(encoding="utf-8") if (cut / "events.jsonl").exists() else ""
        ):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, lambda *_: None)  # one that comes too late must not end the tests
    presser = Thread(target=interrupt)
    presser.start()
    try:
        code, out, err = program("train", "--data", rows, "--run", "cut", *long)
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130, err
    assert out == ""
    assert "sft resume cut" in err
    assert not (cut / "final").exists()
    _, err = sft("resume", "--runs", tmp_path / "runs")
    assert "step 56/60" in err
    assert "step 50/60" not in err
    ends = [load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000060" / "model.safetensors")
            for name in ("whole", "cut")]  # fmt: skip
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    steps = [event["step"] for event in events_of(cut, "StepDone")]
    assert steps == list(range(1, 61))


def test_eval_numbers_do_not_depend_on_the_batch_size(run, tmp_path):
    reports = [
        json.loads(sft("eval", "first", "--runs", tmp_path / "runs", "--json", "--batch-size", size)[0])
        for size in (1, 7, 32)
    ]
    for report in reports[1:]:
        for model in ("tuned", "base"):
            for name, value in reports[0][model].items():
                if name not in {"seconds", "sources"}:
                    assert report[model][name] == (
                        value
                        if isinstance(value, str) or value is None
                        else pytest.approx(value, rel=1e-6, abs=1e-6)
                    )


def test_eval_fails_with_3_where_a_limit_is_not_met(run, tmp_path):
    flags = ["eval", "first", "--runs", str(tmp_path / "runs"), "--no-base"]
    assert CliRunner().invoke(app, [*flags, "--fail-above", "loss=0.001"]).exception.exit_code == 3
    assert CliRunner().invoke(app, [*flags, "--fail-under", "loss=0.001"]).exit_code == 0
    assert "loss" in CliRunner().invoke(app, [*flags, "--fail-under", "los=1"]).exception.hint
