"""Which precision matrix products run in, what the processor is, and the memory of tensors that were freed."""

import os
import subprocess
import sys

import pytest
import torch

from sftcli import runtime
from sftcli.runtime import choose_dtype, processor

CPU = torch.device("cpu")


def test_answers_are_computed_in_bfloat16_where_there_are_instructions_for_it(monkeypatch):
    monkeypatch.setattr(runtime, "has_bf16_products", lambda device: True)
    assert choose_dtype("auto", CPU) is torch.bfloat16


def test_a_processor_without_bfloat16_instructions_takes_float32(monkeypatch):
    monkeypatch.setattr(runtime, "has_bf16_products", lambda device: False)
    assert choose_dtype("auto", CPU) is torch.float32


def test_the_processor_is_told_from_another_and_the_same_is_told_alike(monkeypatch):
    one = processor()
    assert one == processor()
    assert torch.__version__ in one
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert processor() != one
    assert not runtime.has_matrix_units()


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


def test_a_gpu_takes_more_at_once_than_a_laptop():
    here, there, other = (runtime.pass_sizes(torch.device(kind)) for kind in ("cpu", "cuda", "mps"))
    assert (here.heldout_positions, here.decode_rows, here.prompt_tokens) == (4096, 32, 1024)
    assert (there.heldout_positions, there.decode_rows, there.prompt_tokens) == (32_768, 1024, 16_384)
    assert other == here
