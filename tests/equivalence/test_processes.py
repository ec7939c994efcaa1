"""One, two and three processes take the same steps."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sftcli.config.training_settings import TrainingSettings
from sftcli.training.distributed import Group
from tests.support.recording import MemoryStore
from tests.support.training import build_trainer


def _trained(group: Group) -> tuple[list[float], dict[str, torch.Tensor]]:
    settings = TrainingSettings(
        max_steps=3, batch_size=6, micro_batch_size=2, learning_rate=1e-3, warmup_steps=0, precision="fp32"
    )
    trainer = build_trainer(settings=settings, store=MemoryStore(), emit=lambda _: None)
    trainer.group = group
    losses = [trainer.take_step().loss for _ in range(3)]
    masters = trainer.weights.masters
    if group.size > 1:
        assert group.exchanged_bytes == 3 * 4 * sum(master.numel() for master in masters.values())
    return losses, {name: master.detach().clone() for name, master in masters.items()}


def _one_of_several(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        losses, weights = _trained(Group(rank=rank, size=size))
        alone_losses, alone = _trained(Group())
        assert losses == pytest.approx(alone_losses, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # two processes of the real program are compared in the fast tests
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_end_on_the_losses_and_weights_of_one(size: int, tmp_path: Path) -> None:
    spawn(_one_of_several, args=(size, str(tmp_path)), nprocs=size)  # type: ignore[no-untyped-call]
