"""Which precision the matrix products of a training run in, and the memory of tensors that were freed."""

import os
import subprocess
import sys

import pytest
import torch

from sftcli import runtime
from sftcli.runtime import choose_dtype, choose_training_dtype

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Return what sets the measured rates of a machine with bfloat16 instructions."""
    monkeypatch.setattr(runtime, "has_bf16_products", lambda device: True)

    def measured(**rates):
        by_dtype = {getattr(torch, name): rate for name, rate in rates.items()}
        monkeypatch.setattr(runtime, "matmul_flops", lambda device, dtype: by_dtype[dtype])

    return measured


@pytest.mark.parametrize(
    ("bfloat16", "chosen"), [(0.5, torch.float32), (0.95, torch.bfloat16), (8.0, torch.bfloat16)]
)
def test_auto_trains_in_the_precision_that_multiplies_faster(machine, bfloat16, chosen):
    machine(bfloat16=bfloat16, float32=1.0)
    assert choose_training_dtype("auto", CPU) is chosen


def test_a_precision_that_was_asked_for_is_not_measured_away(machine):
    machine(bfloat16=0.5, float32=1.0)
    assert choose_training_dtype("bf16", CPU) is torch.bfloat16
    machine(bfloat16=8.0, float32=1.0)
    assert choose_training_dtype("fp32", CPU) is torch.float32


def test_answers_are_computed_in_bfloat16_where_there_are_instructions_for_it(machine):
    machine(bfloat16=0.5, float32=1.0)
    assert choose_dtype("auto", CPU) is torch.bfloat16


def test_a_processor_without_bfloat16_instructions_takes_float32(monkeypatch):
    monkeypatch.setattr(runtime, "has_bf16_products", lambda device: False)
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_training_dtype("auto", CPU) is torch.float32


FAULTS = """
import resource, torch
from sftcli.runtime import keep_freed_memory, release_memory
kept = keep_freed_memory(torch.device("cpu"))
def pages_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept_for_backward = [torch.ones(2**21) for _ in range(16)]
    del kept_for_backward
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages_cleared(), pages_cleared(), pages_cleared()
again = pages_cleared()
release_memory(torch.device("cpu"))
print(kept, again, pages_cleared())
"""


def freed_memory(**environ):
    """Return whether freed memory is kept, and the pages that tensors need again: after like ones, and after a release."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=os.environ | environ, capture_output=True, text=True, check=True
    )
    kept, again, released = done.stdout.split()
    return kept == "True", int(again), int(released)


@pytest.mark.skipif(not runtime._GLIBC, reason="the C library is not glibc")
def test_the_memory_of_freed_tensors_serves_the_next_until_it_is_released():
    pages = 2**25 * 4 // os.sysconf("SC_PAGE_SIZE")
    kept, again, released = freed_memory()
    assert kept
    assert again < pages // 100
    assert released > pages // 2


def test_what_the_user_set_for_the_allocator_stays():
    kept, *_ = freed_memory(GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert not kept
