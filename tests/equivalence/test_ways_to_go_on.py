"""A run that was saved on any number of processes in any mode goes on with any number in any mode."""

import shutil
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


def goes_on_and_saves(
    group: Group, folder: str, notes: str, shards: int, until: int, losses: list[float]
) -> None:
    """Go on from the newest checkpoint to step ``until``; the steps must have ``losses``, counted from the first."""
    trainer = trainer_of(group, "tied", shards=shards, max_steps=LAST)
    trainer.store = store_of(trainer, Path(folder), Path(notes))
    if found := list_checkpoints(Path(folder)):
        trainer.restore(read_snapshot(found[-1]))
    while trainer.state.step < until:
        assert trainer.take_step().loss == pytest.approx(losses[trainer.state.step - 1], abs=1e-5)
    trainer.save()
    group.sum([0.0])  # none begins to look before it is there


def go_on(way: str, place: Path, until: int, losses: list[float]) -> Path:
    """Let the run at ``place`` go on in a way; return its new checkpoint."""
    size, shards = WAYS[way]
    arguments = (str(place / "run"), str(place / f"notes-{until}"), shards, until, losses)
    if size == 1:
        goes_on_and_saves(Group(), *arguments)
    else:
        run_together(goes_on_and_saves, size=size, folder=place / f"meeting-{until}", args=arguments)
    return list_checkpoints(place / "run")[-1]


@pytest.mark.parametrize("saved", WAYS)
def test_a_run_goes_on_with_any_number_of_processes_in_any_mode(tmp_path: Path, saved: str) -> None:
    alone = trainer_of(Group(), "tied", max_steps=LAST)
    losses = [alone.take_step().loss for _ in range(LAST)]
    expected = alone.snapshot().weights
    go_on(saved, tmp_path / "first", SAVED, losses)
    for resumed, (size, shards) in WAYS.items():
        shutil.copytree(tmp_path / "first" / "run", tmp_path / resumed / "run")
        last = go_on(resumed, tmp_path / resumed, LAST, losses)
        parts = size if shards > 1 else 1
        assert len([*last.glob("model*.safetensors")]) == len([*last.glob("optimizer*.safetensors")]) == parts
        found = read_snapshot(last)
        for name, weight in expected.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-5)
        if resumed == saved and shards > 1:  # and as if it had never stopped, bit for bit
            whole = go_on(saved, tmp_path / "whole", LAST, losses)
            for path in (*whole.glob("model*.safetensors"), *whole.glob("optimizer*.safetensors")):
                assert path.read_bytes() == (last / path.name).read_bytes(), path.name
