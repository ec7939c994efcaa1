"""What a step costs: memory of the decoder's body and of its head, each by itself."""

from dataclasses import fields
from functools import partial

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.runtime import held_peak_bytes, reachable_memory_bytes
from sftcli.services.train.plan import _copy_bytes
from sftcli.training.probes import cost
from sftcli.training.probes.cost import StepCost, measure_cost
from tests.support.recording import RecordingSink
from tests.support.tiny_experts import build_experts
from tests.support.training import build_trainer, tiny_llama

SIZES = [one.name for one in fields(StepCost)]


# The class of Llama 4's language model names a base model that it does not have.
@pytest.mark.parametrize("build", [tiny_llama, partial(build_experts, "llama4_text")])
def test_memory_of_the_head_is_not_that_of_the_whole_process(build):
    settings = TrainingSettings(max_steps=2, batch_size=4, micro_batch_size=4)
    trainer = build_trainer(settings=settings, store=None, emit=RecordingSink(), model=build())
    found = measure_cost(trainer, last_step=2)
    assert found.head < found.peak / 2


def test_peak_is_what_is_held_and_not_what_tensors_take_alone(monkeypatch):
    monkeypatch.setattr(cost, "held_peak_bytes", lambda _device: 10**15)
    settings = TrainingSettings(max_steps=2, batch_size=4, micro_batch_size=4)
    trainer = build_trainer(settings=settings, store=None, emit=RecordingSink())
    assert measure_cost(trainer, last_step=2).peak == 10**15


def test_memory_of_a_gpu_is_what_is_held_and_what_is_free_there(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (40, 100))  # 40 are of other programs
    assert held_peak_bytes(device) == 30
    assert reachable_memory_bytes(device) == 60
    assert _copy_bytes(StepCost(**dict.fromkeys(SIZES, 8)), 4, device) == 0
    assert _copy_bytes(StepCost(**dict.fromkeys(SIZES, 8)), 4, torch.device("cpu")) == 24
