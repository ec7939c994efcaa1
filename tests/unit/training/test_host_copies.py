"""A snapshot that is copied beside the work of a device holds the step it was taken at."""

from threading import Event

import pytest
import torch

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.copies import HostCopies, host_copies
from sftcli.events import NeverStop
from tests.support.recording import MemoryStore, RecordingSink, assert_equal_bits
from tests.support.training import build_trainer

STEPS = 4
LATE_SECONDS = 0.3  # after which a copy is made that nothing has to come after


class LateCopies(HostCopies):
    """Copies on a slow stream: they are made when something has to come after them, else long after they were asked for."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.is_held = Event()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.full_like(tensor, -1)
        self.waiting.append((target, tensor))
        return target

    def hold(self) -> None:
        if not self.is_held.is_set():
            self._make()
        self.is_held.set()

    def wait(self) -> None:
        if not self.is_held.wait(LATE_SECONDS):
            self._make()

    def _make(self) -> None:
        for target, tensor in self.waiting:
            target.copy_(tensor)


@pytest.mark.parametrize("every", [1, 2])
def test_snapshots_copied_beside_the_steps_are_those_of_steps_that_wait(every: int):
    stores = []
    for make_copies in (host_copies, lambda device, tensors: LateCopies()):
        stores.append(MemoryStore())
        trainer = build_trainer(
            settings=TrainingSettings(max_steps=STEPS, batch_size=8, learning_rate=1e-2, warmup_steps=0),
            store=stores[-1],
            emit=RecordingSink(),
            checkpoint=CheckpointSettings(every_steps=every, in_background=True),
        )
        trainer.make_copies = make_copies
        trainer.fit(NeverStop())
    expected, found = (store.snapshots for store in stores)
    assert found.keys() == expected.keys() == set(range(every, STEPS + 1, every))
    for step, snapshot in expected.items():
        assert_equal_bits(snapshot, found[step])


def test_a_host_copies_at_once():
    tensor = torch.zeros(3)
    copies = host_copies(torch.device("cpu"), [tensor])
    copy = copies.copy(tensor)
    tensor += 1
    copies.hold()
    copies.wait()
    assert copy.tolist() == [0, 0, 0]
