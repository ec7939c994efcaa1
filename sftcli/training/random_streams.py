"""The random streams of several processes: all differ, and a checkpoint holds each of them."""

import random
from dataclasses import fields
from typing import cast

import numpy as np
import torch

from sftcli.runtime import seed_everything
from sftcli.training.distributed.group import Group
from sftcli.training.state import RngState, TrainingSnapshot


def start_stream(group: Group, *, seed: int, step: int = 0) -> None:
    """Seed this process separately from ``step`` on; rank 0 draws what a single process would."""
    if group.rank:
        (word,) = np.random.SeedSequence([seed, group.rank, step]).generate_state(1)
        seed_everything(int(word))


def collect_rng(group: Group) -> list[RngState]:
    """Return the random states of all processes, by rank. All processes must call it together."""
    own = capture_rng()
    names = [field.name for field in fields(own)]
    columns = [group.collect(getattr(own, name)) for name in names]
    return [RngState(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def restore_stream(snapshot: TrainingSnapshot, group: Group, *, seed: int) -> None:
    """Restore this process's stream from ``snapshot``; start a new one if that had another number of processes."""
    states = (snapshot.rng, *snapshot.peers)
    restore_rng(states[group.rank] if len(states) == group.size else snapshot.rng)
    if len(states) != group.size:
        start_stream(group, seed=seed, step=snapshot.state.step)


def capture_rng() -> RngState:
    """Copy the state of every generator."""
    _, words, position, *_ = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    return RngState(
        python=torch.tensor(random.getstate()[1], dtype=torch.int64),
        numpy=torch.tensor([*words.tolist(), position], dtype=torch.int64),
        torch=torch.get_rng_state(),
        device=torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8),
    )


def restore_rng(state: RngState) -> None:
    """Restore every generator to ``state``."""
    random.setstate((3, tuple(state.python.tolist()), None))
    *words, position = state.numpy.tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(state.torch)
    if state.device.numel() and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.device)
