"""A run that was saved on any number of processes in any mode goes on with any number in any mode."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.distributed.group import Group
from tests.support.processes import run_together
from tests.support.saving import store_of
from tests.support.sharing import trainer_of

pytestmark = pytest.mark.slow

SAVED, LAST = 2, 4  # steps
# The number of processes, and how many hold a replica together.
WAYS = {
    "one": (1, 1),
    "ddp-2": (2, 1),
    "ddp-3": (3, 1),
    "ddp-4": (4, 1),
    "fsdp-2": (2, 2),
    "fsdp-3": (3, 3),
    "fsdp-4": (4, 4),
    "hsdp-4": (4, 2),
}


@dataclass(frozen=True)
class Law:
    """How a run trains, and how near to the numbers of one process it has to be: ``losses`` are those, from the first step."""

    optimizer: str
    within: float
    losses: tuple[float, ...] = ()


# What muon multiplies in bfloat16 differs by its rounding where gradients differ in the last bit (see test_modes.py).
ADAMW = Law("adamw", 1e-5)
OTHERS = {law.optimizer: law for law in (Law("adafactor", 1e-5), Law("adamw_lean", 1e-5), Law("muon", 1e-4))}


def trained_alone(law: Law) -> tuple[Law, dict[str, torch.Tensor]]:
    """Return ``law`` with its losses, and the weights that one process ends with."""
    alone = trainer_of(Group(), "tied", max_steps=LAST, optimizer=law.optimizer)
    losses = tuple(alone.take_step().loss for _ in range(LAST))
    return replace(law, losses=losses), alone.snapshot().weights


def goes_on_and_saves(group: Group, folder: str, notes: str, shards: int, until: int, law: Law) -> None:
    """Go on from the newest checkpoint to step ``until``."""
    trainer = trainer_of(group, "tied", shards=shards, max_steps=LAST, optimizer=law.optimizer)
    trainer.store = store_of(trainer, Path(folder), Path(notes))
    if found := list_checkpoints(Path(folder)):
        trainer.restore(read_snapshot(found[-1]))
    while trainer.state.step < until:
        assert trainer.take_step().loss == pytest.approx(law.losses[trainer.state.step - 1], abs=law.within)
    trainer.save()
    group.sum([0.0])  # none begins to look before it is there


def go_on(way: str, place: Path, until: int, law: Law) -> Path:
    """Let the run at ``place`` go on in a way; return its new checkpoint."""
    size, shards = WAYS[way]
    arguments = (str(place / "run"), str(place / f"notes-{until}"), shards, until, law)
    if size == 1:
        goes_on_and_saves(Group(), *arguments)
    else:
        run_together(goes_on_and_saves, size=size, folder=place / f"meeting-{until}", args=arguments)
    return list_checkpoints(place / "run")[-1]


def assert_near(checkpoint: Path, expected: dict[str, torch.Tensor], *, within: float) -> None:
    found = read_snapshot(checkpoint)
    for name, weight in expected.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=within)


def assert_same_bytes(checkpoint: Path, other: Path) -> None:
    for path in (*other.glob("model*.safetensors"), *other.glob("optimizer*.safetensors")):
        assert path.read_bytes() == (checkpoint / path.name).read_bytes(), path.name


@pytest.mark.parametrize("saved", WAYS)
def test_a_run_goes_on_with_any_number_of_processes_in_any_mode(tmp_path: Path, saved: str) -> None:
    law, expected = trained_alone(ADAMW)
    go_on(saved, tmp_path / "first", SAVED, law)
    for resumed, (size, shards) in WAYS.items():
        shutil.copytree(tmp_path / "first" / "run", tmp_path / resumed / "run")
        last = go_on(resumed, tmp_path / resumed, LAST, law)
        parts = size if shards > 1 else 1
        assert len([*last.glob("model*.safetensors")]) == len([*last.glob("optimizer*.safetensors")]) == parts
        assert_near(last, expected, within=law.within)
        if resumed == saved and shards > 1:  # and as if it had never stopped, bit for bit
            assert_same_bytes(last, go_on(saved, tmp_path / "whole", LAST, law))


@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("ways", [("one", "fsdp-2", "one"), ("fsdp-3", "ddp-2", "hsdp-4")])
def test_a_run_of_another_optimizer_goes_on_in_another_mode_and_back(
    tmp_path: Path, optimizer: str, ways: tuple[str, ...]
) -> None:
    law, expected = trained_alone(OTHERS[optimizer])
    for until, way in zip((1, 3, LAST), ways, strict=True):
        last = go_on(way, tmp_path, until, law)
    assert_near(last, expected, within=law.within)


@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("way", ["fsdp-3", "hsdp-4"])
def test_a_stopped_run_of_another_optimizer_is_one_that_never_stopped_bit_for_bit(
    tmp_path: Path, optimizer: str, way: str
) -> None:
    law, _ = trained_alone(OTHERS[optimizer])
    go_on(way, tmp_path / "stopped", SAVED, law)
    last = go_on(way, tmp_path / "stopped", LAST, law)
    assert_same_bytes(last, go_on(way, tmp_path / "whole", LAST, law))
