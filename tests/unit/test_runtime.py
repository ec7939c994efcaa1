"""Which precision the matrix products of a training run in."""

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
