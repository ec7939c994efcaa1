"""The losses of a small training, to the last digit: what moves them is a change of numbers, and is said in the changelog."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.golden import GOLDEN, assert_golden
from tests.support.runs import StopAtStep, numbers_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

# The oldest instructions and one thread, so that every x86 processor sums in the same order.
SAME_SUMS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
FORMS = {
    "full": ("training.precision=fp32",),
    "unpacked": ("training.precision=fp32", "training.packing=off"),
    "lora": ("training.precision=fp32", "adapter.kind=lora", "adapter.rank=4"),
}
NEVER = 99
EXACT_WITH = "2.13"  # other releases of torch may sum in another order


def losses(place: Path, form: str) -> str:
    """Train as users do; return a line for each step and each held-out loss."""
    write_rows(place / "rows.jsonl")
    model = build_tiny_model(place / "tiny")
    train(settings_of(place, model, *FORMS[form]), StopAtStep(NEVER))
    (run,) = (place / "runs").iterdir()
    kinds = {"StepDone": "step", "HeldoutDone": "heldout"}
    lines = [
        f"{kinds[str(event['event'])]:<8}{event['step']:>3}  {event['loss']!r}" for event in numbers_of(run)
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_the_golden_file(form, tmp_path):
    child = [sys.executable, "-m", "tests.equivalence.test_golden_losses", str(tmp_path), form]
    repo = Path(__file__).parents[2]
    env = os.environ | SAME_SUMS | {"PYTHONPATH": str(repo)}
    done = subprocess.run(child, cwd=repo, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if platform.machine() == "x86_64" and torch.__version__.startswith(EXACT_WITH):
        assert_golden(f"losses/{form}.txt", done.stdout)
    found = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    golden = (GOLDEN / "losses" / f"{form}.txt").read_text(encoding="utf-8").splitlines()
    assert found == pytest.approx([float(line.split()[-1]) for line in golden], rel=1e-4)


if __name__ == "__main__":
    sys.stdout.write(losses(Path(sys.argv[1]), sys.argv[2]))
