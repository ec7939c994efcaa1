"""Each way to share the work, with each number of processes: the steps of one process, and the bytes that are predicted."""

from functools import partial
from pathlib import Path

import pytest
import torch

from sftcli.data.batches.batch import Batch
from sftcli.services.train.start.parallelism import can_ease_together
from sftcli.training.distributed import gradient_exchange
from sftcli.training.distributed.group import Group
from sftcli.training.optim import muon
from sftcli.training.trainer import Trainer
from sftcli.training.weights.sharded import ShardedWeights, layers_of
from tests.support.counting import TrafficCounter
from tests.support.fed_rows import rows_of_steps, train_and_record
from tests.support.processes import run_together
from tests.support.saving import assert_has_parts_of
from tests.support.several import assert_same_training, make_place, steps, train_together
from tests.support.sharing import STEPS, predicted_traffic, trainer_of

pytestmark = pytest.mark.slow

WHOLE = 1
MODES = {  # the number of processes, and how many hold a replica together
    "ddp-2": (2, WHOLE),
    "ddp-3": (3, WHOLE),
    "ddp-4": (4, WHOLE),
    "fsdp-2": (2, 2),
    "fsdp-3": (3, 3),
    "fsdp-4": (4, 4),
    "hsdp-4": (4, 2),
    "hsdp-6": (6, 3),
}
MICRO_BATCHES = 3  # of a step


def same_as_one_process(
    group: Group,
    kind: str,
    shards: int,
    exchanges_each: bool,
    optimizer: str = "adamw",
    within: float = 1e-5,
) -> None:
    gradient_exchange.BUCKET_NUMBERS = 5000  # several of them, in this process alone
    alone = trainer_of(Group(), kind, optimizer=optimizer)
    several = trainer_of(group, kind, shards=shards, optimizer=optimizer)
    if isinstance(several.weights, ShardedWeights):
        several.weights.exchange_each_micro_batch = exchanges_each
    micro_batches = -(-MICRO_BATCHES // group.size)
    predicted = predicted_traffic(
        several, group, micro_batches=micro_batches, exchanges=micro_batches if exchanges_each else 1
    )
    for _ in range(STEPS):
        expected = alone.take_step()
        with TrafficCounter() as counter:
            found = several.take_step()
        assert counter.traffic == predicted
        assert found.exchanged_bytes == predicted.scattered + predicted.summed + predicted.updated
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
    holders = group if several.weights.is_sharded else Group()
    assert_has_parts_of(several.snapshot(), alone.snapshot(), holders, within=within)


@pytest.mark.parametrize("mode", MODES)
def test_losses_weights_and_bytes_are_the_predicted_ones(tmp_path: Path, mode: str) -> None:
    size, shards = MODES[mode]
    run_together(same_as_one_process, size=size, folder=tmp_path, args=("tied", shards, False))


@pytest.mark.parametrize("kind", ["untied", "lora", "checkpointing"])
@pytest.mark.parametrize("shards", [WHOLE, 2], ids=["whole", "in-groups"])
def test_kinds_of_training_are_the_same(tmp_path: Path, kind: str, shards: int) -> None:
    run_together(same_as_one_process, size=4, folder=tmp_path, args=(kind, shards, False))


@pytest.mark.parametrize(("optimizer", "within"), [("adafactor", 1e-5), ("adamw_lean", 1e-5), ("muon", 1e-4)])
@pytest.mark.parametrize("mode", ["fsdp-3", "hsdp-4"])
def test_other_optimizers_have_its_steps_and_the_predicted_bytes(
    tmp_path: Path, mode: str, optimizer: str, within: float
) -> None:
    size, shards = MODES[mode]
    args = ("tied", shards, False, optimizer, within)
    run_together(same_as_one_process, size=size, folder=tmp_path, args=args)


def orthogonal_in_float64(
    matrix: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    """Return what torch makes in bfloat16."""
    first, third, fifth = ns_coefficients
    made = matrix.double() / matrix.double().norm().clamp(min=eps)
    for _ in range(ns_steps):
        square = made @ made.T
        made = first * made + (third * square + fifth * square @ square) @ made
    return made.float()


def is_muon_of_one_process_but_for_rounding(group: Group, shards: int) -> None:
    for place in (torch.optim._muon, muon):
        place._zeropower_via_newtonschulz = orthogonal_in_float64
    muon._MADE_IN = torch.float32
    changes = {"optimizer": "muon", "learning_rate": 1e-2, "max_steps": 8}
    alone, several = (
        trainer_of(Group(), "tied", **changes),
        trainer_of(group, "tied", shards=shards, **changes),
    )
    for _ in range(8):
        assert several.take_step().loss == pytest.approx(alone.take_step().loss, abs=1e-5)
    holders = group if several.weights.is_sharded else Group()
    assert_has_parts_of(several.snapshot(), alone.snapshot(), holders, within=1e-5)


@pytest.mark.parametrize("mode", ["ddp-2", "fsdp-3", "hsdp-4"])
def test_what_makes_muon_differ_is_how_products_in_bfloat16_round(tmp_path: Path, mode: str) -> None:
    size, shards = MODES[mode]
    run_together(is_muon_of_one_process_but_for_rounding, size=size, folder=tmp_path, args=(shards,))


def test_gradients_of_each_micro_batch_stay_inside_groups(tmp_path: Path) -> None:
    run_together(exchanges_between_replicas_once, size=2 * 2, folder=tmp_path)


def exchanges_between_replicas_once(group: Group) -> None:
    alone, several = (
        trainer_of(one, "tied", shards=shards, micro_batch_size=1)
        for one, shards in ((Group(), WHOLE), (group, 2))
    )
    assert isinstance(several.weights, ShardedWeights)
    several.weights.exchange_each_micro_batch = True
    predicted = predicted_traffic(
        several, group, micro_batches=2, exchanges=2
    )  # six of them for four processes
    for _ in range(STEPS):
        expected = alone.take_step()
        with TrafficCounter() as counter:
            found = several.take_step()
        assert counter.traffic == predicted
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)


def refuses_what_is_not_finite_in_one(group: Group) -> None:
    from sftcli.errors import DivergedError

    trainer = trainer_of(group, "tied", shards=2)
    trainer.weights.refuse_nonfinite(1)
    if group.rank == group.size - 1:
        with torch.no_grad():
            next(iter(trainer.weights.masters.values())).to_local()[:1] = float("nan")
    with pytest.raises(DivergedError):
        trainer.weights.refuse_nonfinite(1)


def test_weights_that_are_not_finite_in_one_process_are_saved_by_none(tmp_path: Path) -> None:
    run_together(refuses_what_is_not_finite_in_one, size=4, folder=tmp_path)


class FailsOnce:
    """Runs out of memory in the last process, in pass ``number`` of a step: where a layer computes, or its gradient."""

    def __init__(self, trainer: Trainer, *, number: int, layer: int, in_backward: bool) -> None:
        self.left = number
        self.in_backward = in_backward
        whole = trainer.batch_loss

        def batch_loss(batch: Batch) -> torch.Tensor:
            self.left -= 1
            return whole(batch)

        trainer.batch_loss = batch_loss
        layers_of(trainer.weights.model)[layer].register_forward_hook(self.fail)

    def fail(self, _: torch.nn.Module, __: object, hidden: torch.Tensor) -> None:
        if self.left != 0:
            return
        if self.in_backward:
            hidden.register_hook(self.raise_error)
        else:
            self.raise_error(hidden)

    def raise_error(self, _: torch.Tensor) -> None:
        self.left = -1
        raise torch.OutOfMemoryError("no memory left")


def eases_with_all(
    group: Group, shards: int, exchanges_each: bool, number: int, layer: int, in_backward: bool
) -> None:
    alone = trainer_of(Group(), "tied", batch_size=12)
    several = trainer_of(group, "tied", shards=shards, batch_size=12)
    weights = several.weights
    if isinstance(weights, ShardedWeights):
        weights.exchange_each_micro_batch = exchanges_each
    batch = several.plan.window(0)[0]
    assert can_ease_together(weights, several.batch_loss, batch)
    steps_taken = [several.take_step()]
    with torch.no_grad():
        several.batch_loss(batch)  # as held-out losses do
    if group.rank == group.size - 1:
        FailsOnce(several, number=number, layer=layer, in_backward=in_backward)
    steps_taken += [several.take_step() for _ in range(2)]
    assert [step.micro_batches for step in steps_taken] == [6, 12, 12]
    for found in steps_taken:
        expected = alone.take_step()
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
    holders = group if weights.is_sharded else Group()
    assert_has_parts_of(several.snapshot(), alone.snapshot(), holders, within=1e-5)


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("number", "layer"), [(1, 0), (2, 1)])
@pytest.mark.parametrize(
    ("mode", "exchanges_each"),
    [("ddp-2", False), ("fsdp-2", False), ("fsdp-3", True), ("hsdp-4", False), ("hsdp-4", True)],
)
def test_memory_that_runs_out_inside_a_pass_of_one_process_eases_all(
    tmp_path: Path, mode: str, exchanges_each: bool, number: int, layer: int, in_backward: bool
) -> None:
    size, shards = MODES[mode]
    args = (shards, exchanges_each, number, layer, in_backward)
    run_together(eases_with_all, size=size, folder=tmp_path, args=args)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_together(partial(train_and_record, place, "alone"), size=1)
    return "alone"


@pytest.mark.parametrize("mode", MODES)
def test_a_training_has_the_rows_and_losses_of_one_process(place: Path, alone: str, mode: str) -> None:
    size, shards = MODES[mode]
    changes = (f"training.parallel={mode.partition('-')[0]}", f"training.shard_processes={shards}")
    train_together(partial(train_and_record, place, mode, *changes), size=size)
    fed, expected = (rows_of_steps(place / f"fed-{one}", place / "model") for one in (mode, alone))
    assert fed == expected
    assert_same_training(place, mode, alone)
    assert len({event["exchanged_bytes"] for event in steps(place, mode)}) == 1
