"""``training.compile=on`` through ``sft train``, with the compiler of C++ that torch finds, on a CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.runs import events_of, write_rows
from tests.support.tiny_model import build_tiny_model

STEPS = 4


def sft(folder, *words):
    environ = os.environ | {
        "SFT_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "sftcli", *words]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def steps_of(folder, run):
    return events_of(folder / "runs" / run, "StepDone")


def train(folder, model, run, *words):
    settings = (
        f"training.max_steps={STEPS}", "training.batch_size=4", "training.micro_batch_size=4", "training.warmup_steps=0",
        "training.learning_rate=1e-2", "training.precision=fp32", "training.eval_every_steps=0", "training.eval_answers=0",
        "checkpoint.every_steps=2",
    )  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    rows = write_rows(folder / "rows.jsonl")
    done = sft(folder, "train", "--model", str(model), "--data", str(rows), "--run", run, *sets, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_a_compiled_run_has_the_losses_of_one_that_is_not_and_goes_on(tmp_path):
    model = build_tiny_model(tmp_path / "model")
    train(tmp_path, model, "plain", "--set", "training.compile=off")
    told = train(tmp_path, model, "compiled", "--set", "training.compile=on")
    assert "decoder layers (training.compile)" in told
    assert list((tmp_path / "inductor").rglob("*.so"))
    plain, compiled = (steps_of(tmp_path, run) for run in ("plain", "compiled"))
    assert len(plain) == len(compiled) == STEPS
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    record = json.loads((tmp_path / "runs" / "compiled" / "run.json").read_text())
    assert "by torch.compile" in json.dumps(record)
    resumed = sft(tmp_path, "resume", "compiled", "--verify")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
