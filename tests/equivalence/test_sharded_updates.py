"""Updates of weights that are shared out are those of whole ones, number by number, whatever rows each process has."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import MismatchError
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.optim.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from sftcli.training.weights.placement import full_tensor
from tests.support.processes import run_together

STEPS = 3
SHAPES = {  # fewer rows than processes, rows that no number of them divides, rows of several blocks, experts in one tensor
    "embeddings": (7, 6),
    "matrix": (10, 5),
    "square": (5, 5),
    "wide": (2, 700),
    "gains": (5,),
    "experts": (3, 4, 6),
}
OPTIMIZERS = {"adamw_lean": 0.0, "muon": 0.0, "adafactor": 1e-6}  # and how far from those of one process
BY_ADAMW = {
    "embeddings",
    "gains",
    "experts",
}  # with muon; the kernel of torch rounds the last numbers of a tensor otherwise
ROUNDED = 1e-6
WAYS = {"two": (2, 2), "three": (3, 3), "replicas": (4, 2)}  # processes, and how many hold a replica together


def numbers(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


class Trained:
    """Weights and their optimizer; ``place`` puts a whole tensor where it belongs."""

    def __init__(self, optimizer: str, place=lambda whole: whole.clone(), shard_group=None) -> None:
        self.place = place
        self.masters = {name: torch.nn.Parameter(place(one)) for name, one in numbers(0).items()}
        settings = TrainingSettings(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1)
        self.optimizer = make_optimizer(
            self.masters, settings, embeddings=["embeddings"], shard_group=shard_group
        )

    def step(self, number: int) -> None:
        for name, gradient in numbers(number).items():
            self.masters[name].grad = self.place(gradient)
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: full_tensor(master.detach()) for name, master in self.masters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {
            name: full_tensor(one).clone()
            for name, one in optimizer_tensors(self.optimizer, self.masters).items()
        }


def shared_out(optimizer: str, group: Group, shards: int) -> Trained:
    grid = (shards,) if shards == group.size else (group.size // shards, shards)
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("replicas", "shards")[-len(grid) :])
    placements = [Replicate()] * (len(grid) - 1) + [Shard(0)]
    processes = ShardGroup(group=group, processes=mesh.get_group(mesh.ndim - 1))
    return Trained(optimizer, lambda whole: distribute_tensor(whole, mesh, placements), processes)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], optimizer: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        is_rounded = optimizer == "muon" and name.rpartition("/")[2] in BY_ADAMW
        within = ROUNDED if is_rounded else OPTIMIZERS[optimizer]
        torch.testing.assert_close(
            tensor, expected[name], rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}"
        )


def updates_as_one(group: Group, optimizer: str, shards: int) -> None:
    alone, several = Trained(optimizer), shared_out(optimizer, group, shards)
    for step in range(1, STEPS + 1):
        alone.step(step)
        several.step(step)
    assert_same(several.weights(), alone.weights(), optimizer)
    assert_same(several.state(), alone.state(), optimizer)


def goes_on_from_the_other(group: Group, optimizer: str, shards: int) -> None:
    """Each goes on from the weights and the state of the other."""
    alone, several = Trained(optimizer), shared_out(optimizer, group, shards)
    alone.step(1)
    state, weights = alone.state(), alone.weights()
    restore_optimizer(several.optimizer, several.masters, state)
    with torch.no_grad():
        for name, master in several.masters.items():
            master.copy_(several.place(weights[name]))
    several.step(2)
    alone.step(2)
    assert_same(several.weights(), alone.weights(), optimizer)
    restore_optimizer(alone.optimizer, alone.masters, several.state())
    alone.step(3)
    several.step(3)
    assert_same(several.weights(), alone.weights(), optimizer)
    assert_same(several.state(), alone.state(), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_and_state_are_those_of_one_process(tmp_path: Path, optimizer: str, way: str) -> None:
    size, shards = WAYS[way]
    run_together(updates_as_one, size=size, folder=tmp_path, args=(optimizer, shards))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_one_process_is_shared_out_and_comes_back_whole(
    tmp_path: Path, optimizer: str, way: str
) -> None:
    size, shards = WAYS[way]
    run_together(goes_on_from_the_other, size=size, folder=tmp_path, args=(optimizer, shards))


@pytest.mark.parametrize("optimizer", ["adamw_lean", "adafactor"])
def test_state_of_another_shape_is_refused_by_name(optimizer: str) -> None:
    made = Trained(optimizer)
    made.step(1)
    state = made.state()
    name = next(name for name in state if name.startswith("exp_avg_sq") and name.endswith("/matrix"))
    state[name] = torch.zeros(3)
    with pytest.raises(MismatchError, match=r"exp_avg_sq\w* of matrix in the shape \(3,\)"):
        restore_optimizer(made.optimizer, made.masters, state)


def test_adafactor_of_whole_weights_has_the_bits_of_that_of_transformers() -> None:
    from transformers.optimization import Adafactor

    ours = Trained("adafactor")
    theirs = {name: torch.nn.Parameter(one) for name, one in numbers(0).items()}
    groups = [
        {"params": [one for one in theirs.values() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [theirs["gains"]], "weight_decay": 0.0},
    ]
    optimizer = Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)
    for step in range(1, STEPS + 1):
        ours.step(step)
        for name, gradient in numbers(step).items():
            theirs[name].grad = gradient
        optimizer.step()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.weights().items())
    state = {
        name: one
        for name, one in optimizer_tensors(optimizer, theirs).items()
        if not name.startswith("RMS/")  # of weights, which it uses with another learning rate alone
    }
    assert ours.state().keys() == state.keys()
    assert all(torch.equal(moment, state[name]) for name, moment in ours.state().items())
