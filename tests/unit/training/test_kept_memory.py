"""What a process keeps of freed memory stays near what a step needs."""

import os
import subprocess
import sys

import pytest
import torch

from sftcli.runtime import has_bf16_products
from sftcli.training.out_of_memory import SPARE, KeptMemory

CPU = torch.device("cpu")


class Heap:
    """Holds what a step needs, and gaps that grow by a share of it in each step until they are given back."""

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self.gaps = 0.0
        self.releases = 0

    def step(self, need: int) -> None:
        self.need = need
        self.gaps += self.growth * need

    def used(self, _device: torch.device) -> int:
        return round(self.need + self.gaps)

    def release(self, _device: torch.device) -> None:
        self.gaps, self.releases = 0.0, self.releases + 1


def held(heap: Heap, needs: list[int]) -> list[int]:
    kept, seen = KeptMemory(CPU, used=heap.used, release=heap.release), []
    for need in needs:
        heap.step(need)
        seen.append(heap.used(CPU))
        kept.after_step()
    return seen


def test_memory_that_grows_in_each_step_is_given_back_and_never_far_above_a_step():
    heap = Heap(growth=0.02)
    assert max(held(heap, [1000] * 500)) <= 1000 * (SPARE * 1.02 + 0.02)
    assert 50 <= heap.releases <= 125  # every fifth step or so


def test_steps_that_leave_no_gaps_and_a_step_that_needs_more_are_left_alone():
    heap = Heap(growth=0.0)
    held(heap, [1000, 1500, 1500, 1400] * 50)
    assert heap.releases <= 2


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_of_its_own_memory_is_not_touched(device):
    heap = Heap(growth=0.5)
    kept = KeptMemory(torch.device(device), used=heap.used, release=heap.release)
    for _ in range(20):
        heap.step(1000)
        kept.after_step()
    assert heap.releases == 0


SHAPES = """
from sftcli.environment import set_defaults
set_defaults()
import torch
from sftcli.runtime import memory_bytes, release_memory
device, weight = torch.device("cpu"), torch.randn(64, 64, dtype=torch.bfloat16)
def products(first, count):
    for rows in range(first, first + count):
        torch.nn.functional.linear(torch.randn(rows, 64, dtype=torch.bfloat16), weight)
    release_memory(device)
    return memory_bytes(device)
begin = products(1, 10)
first = products(100, 130)
print(first - begin, products(300, 130) - first)
"""


@pytest.mark.skipif(not has_bf16_products(CPU), reason="this processor has no bfloat16 products")
def test_products_of_ever_new_shapes_take_no_more_memory_in_the_end():
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], env=environ, capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    assert second < max(0.25 * first, 10_000_000)
