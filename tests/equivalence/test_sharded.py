"""Processes that share out the weights take the steps of one process; `test_processes.py` has the fast test of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftcli.errors import UsageError
from sftcli.training.distributed.group import Group
from sftcli.training.loss_scale import FIRST, LossScaler
from sftcli.training.weights.sharded import ShardedWeights
from tests.support.counting import TrafficCounter
from tests.support.processes import run_together
from tests.support.saving import assert_has_parts_of
from tests.support.sharing import STEPS, build_model, predicted_traffic, trainer_of
from tests.support.training import CPU

SIZES = (2, 3)


def same_as_one_process(group: Group, kind: str) -> None:
    alone, several = trainer_of(Group(), kind), trainer_of(group, kind)
    for _ in range(STEPS):
        expected, found = alone.take_step(), several.take_step()
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
    assert_has_parts_of(several.snapshot(), alone.snapshot(), group, within=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kind", ["tied", "untied", "fused", "lora", "experts", "checkpointing", "packed", "modern"]
)
def test_each_kind_of_training_is_that_of_one_process(tmp_path: Path, kind: str, size: int) -> None:
    run_together(same_as_one_process, size=size, folder=tmp_path, args=(kind,))


def rounded_is_near(group: Group) -> None:
    alone = trainer_of(Group(), "tied", dtype=torch.bfloat16)
    several = trainer_of(group, "tied", dtype=torch.bfloat16)
    for _ in range(STEPS):
        assert several.take_step().loss == pytest.approx(alone.take_step().loss, abs=1e-2)
    assert all(master.dtype == torch.float32 for master in several.weights.masters.values())


def scaled_is_near(group: Group) -> None:
    said: list[str] = []
    alone, several = (trainer_of(one, "tied", dtype=torch.float16) for one in (Group(), group))
    several.scaler = LossScaler(several.weights, group, lambda event: said.append(event.text))
    several.state = replace(several.state, loss_scale=2.0**40)  # some overflows at the start
    for _ in range(STEPS):
        expected, found = alone.take_step(), several.take_step()
        assert found.applied
        assert found.loss == pytest.approx(expected.loss, rel=5e-3)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=2e-2)
    assert 1 < several.state.loss_scale < 2.0**40
    assert len(said) == 40 - int(several.state.loss_scale).bit_length() + 1
    assert several.state.loss_scale_steps == STEPS
    whole, gathered = alone.snapshot(), several.snapshot()
    for name, tensor in gathered.weights.items():
        assert tensor.dtype == torch.float32
        assert (tensor - whole.weights[name]).norm() < 0.01 * tensor.norm(), name


@pytest.mark.slow
def test_products_in_float16_are_scaled_alike_in_all_processes(tmp_path: Path) -> None:
    run_together(scaled_is_near, size=2, folder=tmp_path)


def bad_rows_of_one_process_are_a_bad_step_of_all(group: Group) -> None:
    several = trainer_of(group, "tied", dtype=torch.float16)
    several.scaler = LossScaler(several.weights, group, lambda _: None)
    whole = several.batch_loss
    factor = float("nan") if group.rank else 1.0
    several.batch_loss = lambda batch: whole(batch) * factor
    step = several.take_step()
    assert (step.applied, several.state.bad_steps, several.state.loss_scale) == (False, 1, FIRST)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_moves_no_scale(tmp_path: Path) -> None:
    run_together(bad_rows_of_one_process_are_a_bad_step_of_all, size=2, folder=tmp_path)


def refuses_what_float16_has_not(group: Group) -> None:
    model = build_model("tied")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    with pytest.raises(UsageError, match=r"up_proj\.weight holds numbers above 65504"):
        ShardedWeights(model, compute_dtype=torch.float16, group=group, shards=2, device=CPU)


@pytest.mark.slow
def test_weights_that_float16_has_not_are_refused_before_they_are_shared_out(tmp_path: Path) -> None:
    run_together(refuses_what_float16_has_not, size=2, folder=tmp_path)


@pytest.mark.slow
def test_products_in_bfloat16_leave_float32_masters(tmp_path: Path) -> None:
    run_together(rounded_is_near, size=2, folder=tmp_path)


def counts_what_is_predicted(group: Group, exchange_each_micro_batch: bool, optimizer: str) -> None:
    trainer = trainer_of(group, "tied", optimizer=optimizer)
    assert isinstance(trainer.weights, ShardedWeights)
    trainer.weights.exchange_each_micro_batch = exchange_each_micro_batch
    micro_batches = -(-3 // group.size)  # three micro-batches a step
    exchanges = micro_batches if exchange_each_micro_batch else 1
    expected = predicted_traffic(trainer, group, micro_batches=micro_batches, exchanges=exchanges)
    for _ in range(2):
        with TrafficCounter() as counter:
            trainer.take_step()
        assert counter.traffic == expected
    assert group.exchanged_bytes == 2 * (expected.scattered + expected.updated)
    assert (expected.updated > 0) == (optimizer in {"muon", "adafactor"})


@pytest.mark.slow
@pytest.mark.parametrize("exchange_each_micro_batch", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_exchanged_bytes_are_the_predicted_ones(
    tmp_path: Path, size: int, exchange_each_micro_batch: bool
) -> None:
    args = (exchange_each_micro_batch, "adamw")
    run_together(counts_what_is_predicted, size=size, folder=tmp_path, args=args)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_lean", "adafactor", "muon"])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_updates_are_the_predicted_ones(tmp_path: Path, size: int, optimizer: str) -> None:
    run_together(counts_what_is_predicted, size=size, folder=tmp_path, args=(False, optimizer))
