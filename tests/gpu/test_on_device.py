"""What the check on a GPU compares, one test each: on the CPU, and on CUDA with ``pytest -m gpu``."""

import json

import pytest
import torch

from benchmarks.gpu.correct import CHECKS
from benchmarks.gpu.findings import Check
from benchmarks.gpu.speed import compare_plans
from benchmarks.gpu.training import kernels

QUICK = {"attention"}  # on a CPU
ON_CUDA = {"plans": compare_plans}  # the memory of a process on a CPU depends on how many steps there were
CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
)


def cases():
    for name in CHECKS:
        yield pytest.param(name, "cpu", marks=() if name in QUICK else pytest.mark.slow)
    for name in CHECKS | ON_CUDA:
        yield pytest.param(name, "cuda", marks=CUDA)


@pytest.mark.parametrize(("name", "device"), list(cases()))
def test_verdicts_are_ok(tmp_path, name, device):
    check = Check(
        stage="correct",
        device=torch.device(device, 0) if device == "cuda" else torch.device("cpu"),
        out=tmp_path,
        work=tmp_path,
        tokenizer=None,
    )
    with kernels():
        (CHECKS | ON_CUDA)[name](check)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert any(line["verdict"] == "ok" for line in found)
    assert [line for line in found if line["verdict"] not in ("ok", "left out", "measured")] == []
