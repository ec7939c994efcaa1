"""The check on a GPU keeps to its seconds, says what it cut, and holds results against its bars."""

import io
import json
import sys

import pytest
import torch

from benchmarks.gpu import check
from benchmarks.gpu.findings import Check
from benchmarks.gpu.summary import BARS, Results, print_summary
from benchmarks.gpu.training import timed_steps, tiny_trainer


def ended(tmp_path, code, *, seconds):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-c", code]
    check._run("env", command, results, io.BytesIO(), seconds=seconds)
    return json.loads(results.read_text().splitlines()[-1])


def test_a_stage_that_ends_is_ok_and_one_that_fails_is_not(tmp_path):
    assert ended(tmp_path, "pass", seconds=60)["verdict"] == "ok"
    assert ended(tmp_path, "raise SystemExit(3)", seconds=60)["verdict"] == "FAIL"


def test_a_stage_that_runs_out_of_its_seconds_is_cut_and_says_so(tmp_path):
    line = ended(tmp_path, "import time; time.sleep(60)", seconds=1)
    assert (line["verdict"], line["given"]) == ("CUT", 1)
    assert line["seconds"] < 30


def test_a_stage_without_seconds_is_left_out_and_says_so(tmp_path):
    assert ended(tmp_path, "raise SystemExit(1)", seconds=0)["verdict"] == "LEFT OUT"


def test_later_stages_keep_the_seconds_that_they_begin_with():
    least = check.LIMITS["cli"].least + check.LIMITS["decode"].least
    assert check.given("trl", ["cli", "decode"], 200) == check.LIMITS["trl"].most
    assert check.given("trl", ["cli", "decode"], least + 50) == 50
    assert check.given("trl", ["cli", "decode"], least + 1) == 0
    for part in check.PARTS.values():
        assert sum(check.LIMITS[stage].least for stage in part.stages) <= part.budget
        assert part.budget <= 370


def test_the_rate_of_products_is_that_of_the_work(tmp_path):
    cpu = torch.device("cpu")
    told = Check(stage="speed", device=cpu, out=tmp_path, work=tmp_path, tokenizer=None)
    trainer = tiny_trainer(told, dtype=torch.float32, batch_size=2, micro_batch_size=2)
    found = timed_steps(told, trainer, warm=0, steps=2)
    weights = sum(master.numel() for master in trainer.weights.masters.values() if master.ndim > 1)
    for_a_token = found["tflops"] * 1e12 / found["tokens_per_s"]
    assert 3 * weights < for_a_token < 8 * weights  # 6 each, fewer of the head, and attention


LINES = [
    {"stage": "env", "name": "peak", "verdict": "measured", "bfloat16_tflops": 700.0},
    {"stage": "speed", "name": "qwen15: as it is", "verdict": "measured", "tokens_per_s": 40_000, "tflops": 350.0},
    {"stage": "trl", "name": "qwen15 packed, Liger", "verdict": "measured", "tokens_per_s": 50_000},
    {"stage": "trl", "name": "qwen15 grouped, Liger", "verdict": "measured", "tokens_per_s": 20_000},
]  # fmt: skip


def test_bars_are_held_against_what_was_measured(capsys):
    results = Results(LINES)
    found = {bar.name: bar for bar in BARS}
    assert found["1.5B: part of the measured rate of products"].found(results) == pytest.approx(0.5)
    assert found["1.5B over TRL's best"].found(results) == pytest.approx(0.8)
    assert print_summary(LINES, is_cuda=True, has_all=False) == 1
    assert print_summary(LINES, is_cuda=True, has_all=True) == len(BARS) - 1
    assert print_summary(LINES, is_cuda=False, has_all=True) == 0
    assert "FAIL [bar] 1.5B over TRL's best: {'found': '0.8', 'asked': '>= 1'}" in capsys.readouterr().out
