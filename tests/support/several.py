"""Trainings of several processes of the real program on the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from sftcli.config.resolve import parse_set, resolve
from sftcli.events import NeverStop, Session
from sftcli.services.processes.meeting import PREFIX
from sftcli.services.processes.peers import OVER
from sftcli.services.train.lead import TrainRequest, run_training
from tests.support.forked import end_forked, start_forked
from tests.support.tiny_model import build_tiny_model

REPO = Path(__file__).parents[2]
FLAGS = (
    "training.batch_size=6", "training.micro_batch_size=2", "training.learning_rate=1e-2", "training.packing=off",
    "training.precision=fp32", "training.eval_every_steps=4", "data.heldout_fraction=0.2", "checkpoint.every_steps=2",
    "checkpoint.keep_last=9", "training.eval_answers=0",
)  # fmt: skip


def train_here(place: Path, model: Path, run: str, *changes: str, max_steps: int = 8) -> None:
    """Train as ``flags`` say in this process."""
    sets = (
        *FLAGS, *changes, f"run.root={place / 'runs'}", f"run.name={run}", f"model.name={model}",
        f"training.max_steps={max_steps}", f"data.sources={place / 'rows.jsonl'}",
    )  # fmt: skip
    resolved = resolve(preset=None, config_file=None, overrides=tuple(map(parse_set, sets)), environ={})
    request = TrainRequest(resolved=resolved, label="run", command="sft train")
    run_training(request, Session(lambda _: None, NeverStop()))


def train_together(work: Callable[[], None], *, size: int) -> None:
    """Do ``work``, a training, in ``size`` forked processes that find each other by the variables of torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [start_forked(partial(_work_at, rank, size, store.port, work)) for rank in range(size)]
    codes = [end_forked(children[0])]
    dist.PrefixStore(f"{PREFIX}/0", store).set(OVER, "1")  # the first one says so when its interpreter exits
    codes += [end_forked(child) for child in children[1:]]
    assert codes == [0] * size


def _work_at(rank: int, size: int, port: int, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    work()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_rows(path: Path, count: int = 40) -> Path:
    """Write rows whose numbers of tokens tell them apart."""
    lines = [
        json.dumps({"question": f"Say a {n} times.", "answer": "a " * (1 + n * 7 % count)})
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def flags(model: Path, run: str, *changes: str, max_steps: int = 8) -> list[str]:
    """Return the flags of a training in the folder of the command."""
    sets = [part for change in (*FLAGS, *changes) for part in ("--set", change)]
    return ["--data", "rows.jsonl", "--model", str(model), "--max-steps", str(max_steps), "--run", run, *sets]


def start(place: Path, *arguments: str, module: str = "sftcli", **environ: str) -> subprocess.Popen[str]:
    """Start the program in the folder ``place``."""
    own = {
        "PYTHONPATH": str(REPO), "SFT_CACHE_DIR": str(place / "cache"), "XDG_STATE_HOME": str(place / "state"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=place,
        env=os.environ | own | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of a command."""
    out, err = process.communicate(timeout=100)
    return Ended(process.returncode, out, err)


def sft(place: Path, *arguments: str, **environ: str) -> Ended:
    """Run the program to its end."""
    return end(start(place, *arguments, **environ))


def events(place: Path, run: str) -> list[dict]:
    """Return the events that are in the log of a run by now."""
    path = place / "runs" / run / "events.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(place: Path, run: str) -> list[dict]:
    return [event for event in events(place, run) if event["event"] == "StepDone"]


def weights(place: Path, run: str, name: str = "final/model.safetensors") -> dict[str, Tensor]:
    return load_file(place / "runs" / run / name)


def checkpoint_bytes(place: Path, run: str, step: int) -> dict[str, bytes]:
    """Return weights, optimizer and random states of a checkpoint."""
    folder = place / "runs" / run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def assert_same_training(
    place: Path,
    run: str,
    other: str,
    name: str = "final/model.safetensors",
    *,
    within: float = 1e-5,
    losses_within: float | None = None,
    strays: float = 0.0,
) -> None:
    """The same rows in every step, and losses and final weights ``within`` so much, losses ``losses_within`` where that is given.

    One weight of a thousand may be further away, but no further than ``strays``.
    """
    import pytest

    ours, theirs = steps(place, run), steps(place, other)
    counted = (
        "step",
        "tokens",
        "response_tokens",
        "padding_tokens",
        "examples",
        "rows",
        "micro_batches",
        "epoch",
    )
    assert [[event[key] for key in counted] for event in ours] == [
        [event[key] for key in counted] for event in theirs
    ]
    losses_within = within if losses_within is None else losses_within
    for kind in ("StepDone", "HeldoutDone"):
        losses = [
            [event["loss"] for event in events(place, one) if event["event"] == kind] for one in (run, other)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=losses_within)
    stored, expected = weights(place, run, name), weights(place, other, name)
    assert stored.keys() == expected.keys()
    for key, tensor in stored.items():
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype)
    apart = torch.cat([(tensor - expected[key]).abs().flatten() for key, tensor in stored.items()])
    assert apart.max() <= max(within, strays)
    assert (apart > within).double().mean() <= (1e-3 if strays else 0.0)


def make_place(folder: Path) -> Path:
    """Put rows and the tiny model into ``folder``, for trainings there."""
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model")
    return folder


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Return the numbers of the processes that ``launcher`` has started, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text(encoding="ascii").split():
        for line in Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0"):
            if line.startswith("RANK="):
                found[int(line.removeprefix("RANK="))] = int(pid)
    return found


def signal_after(
    place: Path, run: str, launcher: subprocess.Popen[str], *, step: int, number: int, to: int | None
) -> dict[int, int]:
    """Send a signal once ``step`` is in the log: to the process of rank ``to``, or to the launcher; return all ranks."""
    wait_until(launcher, lambda: len(steps(place, run)) >= step)
    ranks = ranks_of(launcher)
    os.kill(launcher.pid if to is None else ranks[to], signal.Signals(number))
    return ranks


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Wait for something that ``process`` does while it runs."""
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            raise AssertionError(process.communicate()[1])
