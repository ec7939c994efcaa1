"""Kill processes of a real training that share the weights out, at random moments of their saves, go on, and compare with a run that
was left in peace.

    OMP_NUM_THREADS=1 python -m tests.crash.sharded --rounds 100

A round is one kill -9, of one process or of all, at a random moment of a save more often than not. After each, no checkpoint that was
announced may be lost, and none may be there that does not verify. The numbers of processes change between runs and not within
one, so that weights, optimizer, random states and events of each end must be those of the undisturbed run of that many, bit for bit.
The processes are forked, so that torch is imported once.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from sftcli.errors import DataError, NotFoundError
from sftcli.services.processes.failures import describe_failure, lost_peer
from sftcli.services.processes.meeting import PREFIX
from sftcli.services.processes.peers import OVER
from sftcli.services.processes.pulse import FAILURE
from sftcli.training.checkpoint.format import newest_good, verify
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.crash.stops import LOGGED, forked
from tests.support.runs import left_by, write_rows
from tests.support.tiny_model import build_tiny_model

STEPS = 24
SIZES = (2, 3)
# Loaded once, in the parent.
LOADED = (
    "sftcli.cli.app",
    "sftcli.services.train.lead",
    "sftcli.services.train.worker",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "peft",
    "pandas",
    "matplotlib.figure",
)
_END_SECONDS = (
    30  # in which what is left of a training ends by itself, on a busy machine; a launcher gives it 8
)


@dataclass
class Training:
    """Forked processes of one training, and the store at which they meet."""

    children: dict[int, int]  # rank -> process, of those that have not ended
    store: dist.TCPStore
    codes: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        """Take note of processes that have ended; the first one's end lets the others end."""
        for rank, child in list(self.children.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.children[rank]
                if rank == 0:
                    dist.PrefixStore(f"{PREFIX}/0", self.store).set(OVER, "1")

    def kill(self, ranks: list[int]) -> int:
        """Kill processes and say so at the store as a launcher does; return how many others did not end by themselves then."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.children[rank], signal.SIGKILL)
        described = describe_failure(lost_peer("a process was killed"), rank=ranks[0] if ranks else 0)
        dist.PrefixStore(f"{PREFIX}/0", self.store).compare_set(FAILURE, "", described)
        end = time.monotonic() + _END_SECONDS
        while self.children and time.monotonic() < end:
            self.look()
            time.sleep(0.01)
        forced = len(self.children)
        for child in self.children.values():
            os.kill(child, signal.SIGKILL)
        while self.children:
            self.look()
        return forced


@dataclass
class Monkey:
    """One experiment in ``root``."""

    root: Path
    seed: int
    killed: Counter[str] = field(default_factory=Counter)  # who, when -> kills
    runs: int = 0
    lost: int = 0
    forced: Counter[str] = field(
        default_factory=Counter
    )  # when -> processes that had to be ended with the killed one
    announced: int = 0  # looks at a run with an announced checkpoint

    def __post_init__(self) -> None:
        os.environ |= {
            "SFT_CACHE_DIR": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.random = random.Random(self.seed)
        self.model = build_tiny_model(self.root / "model", dropout=0.1)
        self.rows = write_rows(self.root / "rows.jsonl", 60)

    def start(self, name: str, size: int) -> Training:
        """Fork the processes of ``sft train``, which starts the run or goes on with it."""
        argv = [
            "sft", "train", "--data", str(self.rows), "--model", str(self.model), "--run", name, "--resume", "auto",
            "--max-steps", str(STEPS), "--quiet",
        ]  # fmt: skip
        for value in (
            f"run.root={self.root / 'runs'}", "training.parallel=fsdp", "training.batch_size=6", "training.micro_batch_size=2",
            "training.learning_rate=1e-2", "training.precision=fp32", "data.heldout_fraction=0.2", "training.eval_every_steps=8",
            "training.eval_answers=0", "checkpoint.every_steps=2", "checkpoint.keep_last=1",
        ):  # fmt: skip
            argv += ["--set", value]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(store.port)}
        children = {}
        for rank in range(size):
            os.environ["RANK"] = str(rank)
            children[rank] = forked(argv, self.root / "output.txt", None)
        return Training(children, store)

    def undisturbed(self, size: int) -> tuple[dict[str, str], float]:
        """Train to the end; return the result and the seconds it took."""
        begin, name = time.monotonic(), f"golden-{size}"
        training = self.start(name, size)
        while training.children:
            training.look()
            time.sleep(0.01)
        if set(training.codes.values()) != {0}:
            raise SystemExit(f"the undisturbed run failed:\n{self.output()}")
        return self.result(name), time.monotonic() - begin

    def result(self, name: str) -> dict[str, str]:
        """Return hashes of what a finished run has left, and its events without times."""
        hashes, events = left_by(self.root / "runs" / name, STEPS, LOGGED)
        return hashes | {"events": json.dumps(events)}

    def disturb(self, name: str, size: int, seconds: float, rounds: int) -> None:
        """Train a run to its end through kills, until there were ``rounds`` of all runs."""
        while not (self.root / "runs" / name / "final").exists():
            logged, training = len(self.events(name)), self.start(name, size)
            is_left_alone = sum(self.killed.values()) >= rounds
            if self.waits(training, name, float("inf") if is_left_alone else self.random.uniform(0, seconds)):
                if set(training.codes.values()) != {0}:
                    raise SystemExit(f"{name} failed with {training.codes}:\n{self.output()}")
                continue
            ranks = self.random.choice([[0], [self.random.randrange(1, size)], list(range(size))])
            who = "all" if len(ranks) > 1 else "the first" if ranks == [0] else "another"
            ranks = [rank for rank in ranks if rank in training.children]
            when = "while saving" if self.is_saving(name) else "else"
            has_begun = any(event["event"] == "FitStarted" for event in self.events(name)[logged:])
            self.forced["in training" if has_begun else "at the start"] += training.kill(ranks)
            self.killed[f"{who}, {when}"] += 1
            self.look(name)

    def waits(self, training: Training, name: str, seconds: float) -> bool:
        """Wait for a random time, and then mostly for the next save and a part of it; return whether all processes have ended."""
        end, wants_save = time.monotonic() + seconds, self.random.random() < 0.8
        while time.monotonic() < end:
            training.look()
            if not training.children:
                return True
            time.sleep(0.001)
        end = time.monotonic() + 10
        while wants_save and training.children and not self.is_saving(name) and time.monotonic() < end:
            training.look()
        time.sleep(self.random.choice([0.0, self.random.uniform(0, 0.02), self.random.uniform(0, 0.2)]))
        training.look()
        return not training.children

    def is_saving(self, name: str) -> bool:
        """Return whether a checkpoint is half there."""
        return any((self.root / "runs" / name / "checkpoints").glob(".sft-*-tmp-step-*"))

    def events(self, name: str) -> list[dict[str, object]]:
        """Return what is in the log of a run."""
        log = self.root / "runs" / name / "events.jsonl"
        lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
        return [json.loads(line) for line in lines]

    def look(self, name: str) -> None:
        """Compare what was announced with what is there, which must verify."""
        run = self.root / "runs" / name
        saved = max(
            (int(str(event["step"])) for event in self.events(name) if event["event"] == "CheckpointSaved"),
            default=0,
        )
        found = list_checkpoints(run / "checkpoints")
        for checkpoint in found:
            try:
                verify(checkpoint)
            except (DataError, NotFoundError) as error:
                raise SystemExit(f"a checkpoint has its name and is not whole: {error}") from error
        best = newest_good(run / "checkpoints", warn=lambda text: None) if found else None
        self.announced += saved > 0
        self.lost += saved > (step_of(best) if best else 0)

    def output(self) -> str:
        """Return the end of what the processes printed."""
        return (self.root / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]


def main() -> None:
    """Run the experiment and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in LOADED:
        importlib.import_module(name)
    begin, different = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="sharded-") as folder:
        monkey = Monkey(Path(folder), options.seed)
        golden = {size: monkey.undisturbed(size) for size in SIZES}
        while sum(monkey.killed.values()) < options.rounds:
            size = SIZES[monkey.runs % len(SIZES)]
            name = f"run-{monkey.runs}"
            wanted, seconds = golden[size]
            monkey.runs += 1
            monkey.disturb(name, size, seconds, options.rounds)
            found = monkey.result(name)
            different += [f"{name}: {key}" for key in wanted if wanted[key] != found.get(key)]
    sys.stdout.write(
        f"{sum(monkey.killed.values())} kills of {monkey.runs} runs of {STEPS} steps on {SIZES} processes "
        f"in {time.monotonic() - begin:.0f} s\n"
        f"{monkey.lost} checkpoints lost of {monkey.announced} looks at a run with an announced one; "
        f"{len(different)} differences to the undisturbed runs\n"
    )
    for phase, count in monkey.killed.most_common():
        sys.stdout.write(f"  {count:4d} killed {phase}\n")
    for phase, count in monkey.forced.items():
        sys.stdout.write(f"  {count:4d} others did not end by themselves {phase}\n")
    for line in different:
        sys.stdout.write(f"  differs: {line}\n")
    sys.exit(1 if monkey.lost or different else 0)


if __name__ == "__main__":
    main()
