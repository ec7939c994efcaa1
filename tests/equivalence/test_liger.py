"""Liger's kernels compute what they stand for: in Triton's interpreter, on a CPU, in float32."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

MISSING = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra gpu)")
def test_kernels_in_the_interpreter_give_what_torch_gives():
    done = subprocess.run(
        [sys.executable, "-m", "tests.equivalence.liger_in_interpreter"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["gate"], found["gate again"], found["rotary"]) < 1e-6
    assert found["model"]["off"] < 1e-5
    assert found["model"]["left_alone"] == []
    assert found["model"]["fused"] == [
        "LlamaAttention by liger", "LlamaMLP by liger", "LlamaRMSNorm by torch",
    ]  # fmt: skip
