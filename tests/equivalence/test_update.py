"""An update that the device decides on is the one that the host decides on, and a bad step leaves no trace in either."""

import math

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.events import Warned
from sftcli.training.optim.optimizer import make_optimizer, optimizer_tensors
from sftcli.training.optim.update import launch_update
from sftcli.training.weights.masters import MasterWeights
from tests.support.recording import MemoryStore, RecordingSink
from tests.support.training import build_trainer, tiny_llama

NEVER = 1e9
STEPS = 4


def a_trainer(*, asks_device, sink=None, dtype=torch.float32, **changes):
    settings = TrainingSettings(
        max_steps=STEPS,
        batch_size=8,
        micro_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        weight_decay=0.1,
        **changes,
    )
    made = build_trainer(settings=settings, store=MemoryStore(), emit=sink or RecordingSink(), dtype=dtype)
    made.asks_device = asks_device
    return made


def state_of(made):
    snapshot = made.snapshot()
    parts = {f"weights/{name}": tensor for name, tensor in snapshot.weights.items()} | dict(
        snapshot.optimizer
    )
    parts |= {f"model/{name}": tensor for name, tensor in made.weights.model.state_dict().items()}
    return {name: tensor.clone() for name, tensor in parts.items()}


def poison(made, steps):
    whole = made.batch_loss
    made.batch_loss = lambda batch: whole(batch) * (math.nan if made.state.step in steps else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [(), (0,), (1, 2)])
def test_the_device_decides_as_the_host_does_bit_for_bit(dtype, bad):
    ends = []
    for asks_device in (False, True):
        made = a_trainer(asks_device=asks_device, dtype=dtype, max_grad_norm=NEVER)
        poison(made, bad)
        taken = [made.take_step() for _ in range(STEPS)]
        assert [one.applied for one in taken] == [step not in bad for step in range(STEPS)]
        numbers = [(one.loss, one.grad_norm, one.learning_rate) for one in taken if one.applied]
        ends.append((numbers, state_of(made)))
    (host, expected), (device, found) = ends
    assert device == host
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_gradients_are_clipped_on_the_device_as_on_the_host_up_to_rounding():
    ends = []
    for asks_device in (False, True):
        # AdamW forgets the size of gradients unless epsilon is of that size.
        made = a_trainer(asks_device=asks_device, max_grad_norm=0.05, epsilon=1e-3)
        taken = [made.take_step() for _ in range(STEPS)]
        assert min(one.grad_norm for one in taken) > 0.05
        ends.append(state_of(made))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-5, atol=1e-7)
    free = a_trainer(asks_device=True, max_grad_norm=NEVER, epsilon=1e-3)
    for _ in range(STEPS):
        free.take_step()
    assert any((tensor - ends[1][name]).abs().max() > 1e-3 for name, tensor in state_of(free).items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_no_weight_and_no_state_of_the_optimizer(value, where):
    weights = MasterWeights(tiny_llama(), compute_dtype=torch.bfloat16)
    optimizer = make_optimizer(weights.masters, TrainingSettings(learning_rate=0.1, weight_decay=0.5))

    def step(nll, bad_gradient):
        for master in weights.masters.values():
            master.grad = torch.full_like(master, 0.01)
        if bad_gradient is not None:
            next(iter(weights.masters.values())).grad.view(-1)[3] = bad_gradient
        sums = torch.tensor([nll, nll, 0.0])
        return launch_update(weights, optimizer, sums, max_norm=1.0, asks_device=True)()

    def everything():
        parts = dict(optimizer_tensors(optimizer, weights.masters)) | weights.tensors()
        return {name: tensor.clone() for name, tensor in parts.items()}

    torch.manual_seed(0)
    assert step(1.0, None).applied
    before = everything()
    taken = step(value, None) if where == "loss" else step(1.0, value)
    assert not taken.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything().items())
    assert step(1.0, None).applied
    assert any(not torch.equal(tensor, before[name]) for name, tensor in everything().items())


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_an_optimizer_that_cannot_leave_a_step_out_is_not_asked_to(optimizer):
    sink = RecordingSink()
    made = a_trainer(asks_device=True, sink=sink, optimizer=optimizer)
    poison(made, (1,))
    made.take_step()
    before = state_of(made)
    assert not made.take_step().applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(made).items())
    assert len(sink.of(Warned)) == 1


def test_the_update_is_launched_before_its_numbers_are_read():
    weights = MasterWeights(tiny_llama(), compute_dtype=torch.float32)
    optimizer = make_optimizer(weights.masters, TrainingSettings(learning_rate=0.1))
    for asks_device in (True, False):
        before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
        for master in weights.masters.values():
            master.grad = torch.ones_like(master)
        finish = launch_update(weights, optimizer, torch.ones(3), max_norm=1.0, asks_device=asks_device)
        moved = any(not torch.equal(tensor, before[name]) for name, tensor in weights.tensors().items())
        assert moved == asks_device
        finish()
