"""The random streams of several processes: all differ, and a checkpoint holds each of them."""

from dataclasses import fields

import numpy as np

from sftcli.runtime import RngState, capture_rng, restore_rng, seed_everything
from sftcli.training.distributed.group import Group
from sftcli.training.state import Snapshot


def start_stream(group: Group, *, seed: int, step: int = 0) -> None:
    """Give this process random numbers of its own from ``step`` on; the first process keeps what a single one would draw."""
    if group.rank:
        (word,) = np.random.SeedSequence([seed, group.rank, step]).generate_state(1)
        seed_everything(int(word))


def collect_rng(group: Group) -> list[RngState]:
    """Return the random states of all processes, by rank. All have to ask at the same time."""
    own = capture_rng()
    names = [field.name for field in fields(own)]
    columns = [group.collect(getattr(own, name)) for name in names]
    return [RngState(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def restore_stream(snapshot: Snapshot, group: Group, *, seed: int) -> None:
    """Go on with this process's stream of ``snapshot``; begin one where that was taken of another number of processes."""
    states = (snapshot.rng, *snapshot.peers)
    restore_rng(states[group.rank] if len(states) == group.size else snapshot.rng)
    if len(states) != group.size:
        start_stream(group, seed=seed, step=snapshot.state.step)
