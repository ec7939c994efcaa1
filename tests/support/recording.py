"""Sinks, stores and flags that remember, for tests of the trainer."""

from dataclasses import dataclass, field, replace

import torch

from sftcli.events import Event
from sftcli.training.state import TrainingSnapshot


@dataclass
class RecordingSink:
    """Keeps every event."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class MemoryStore:
    """Keeps copies of snapshots by step."""

    snapshots: dict[int, TrainingSnapshot] = field(default_factory=dict)

    def save(self, snapshot: TrainingSnapshot, /) -> str:
        self.snapshots[snapshot.state.step] = replace(
            snapshot,
            weights={name: tensor.clone() for name, tensor in snapshot.weights.items()},
            optimizer={name: tensor.clone() for name, tensor in snapshot.optimizer.items()},
        )
        return f"memory:{snapshot.state.step}"


def assert_equal_bits(whole: TrainingSnapshot, other: TrainingSnapshot) -> None:
    """Assert that weights and states of the optimizer have the same names and bits."""
    for part in ("weights", "optimizer"):
        expected, found = getattr(whole, part), getattr(other, part)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


@dataclass
class StopAfter:
    """A stop flag that is raised once it was asked ``questions`` times."""

    questions: int

    def requested(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def save_requested(self) -> bool:
        return False
