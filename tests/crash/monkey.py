"""Kill a real ``sft train`` at random moments, start the same command again until it is done, and compare with a run that
was left in peace.

    python -m tests.crash.monkey --rounds 200

A round is one kill -9. After each one, no checkpoint that was announced may be lost; at the end of each run, weights,
optimizer and events must be those of the undisturbed run. The children are forked, so that torch is imported once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sftcli.training.checkpoint.format import newest_good
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.runs import left_by
from tests.support.tiny_model import build_tiny_model

STEPS = 80


@dataclass
class Monkey:
    """One experiment in ``root``."""

    root: Path
    seed: int
    killed: Counter[str] = field(default_factory=Counter)  # phase -> kills
    runs: int = 0
    resumed: int = 0
    lost: int = 0
    announced: int = 0  # checkpoints that were announced before a kill and found after it

    def __post_init__(self) -> None:
        os.environ |= {
            "SFT_CACHE_DIR": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.random = random.Random(self.seed)
        self.model = build_tiny_model(self.root / "model", dropout=0.1)
        self.rows = self.root / "rows.jsonl"
        rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def start(self, name: str) -> int:
        """Fork a child that runs ``sft train`` and return its process id."""
        argv = [
            "sft", "train", "--data", str(self.rows), "--model", str(self.model), "--run", name, "--resume", "auto",
            "--max-steps", str(STEPS), "--quiet",
        ]  # fmt: skip
        for value in (
            f"run.root={self.root / 'runs'}", "training.batch_size=8", "training.learning_rate=1e-2",
            "data.heldout_fraction=0.2", "training.eval_every_steps=10", "training.eval_answers=2", "checkpoint.every_steps=4",
        ):  # fmt: skip
            argv += ["--set", value]
        child = os.fork()
        if child:
            return child
        with (self.root / "output.txt").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = argv
        try:
            from sftcli.cli.app import main

            main()
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        os._exit(1)

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """Train to the end twice, the second time with prepared data; return the result and the seconds it took."""
        for name in ("first", "golden"):
            begin = time.monotonic()
            _, status = os.waitpid(self.start(name), 0)
            if status:
                raise SystemExit(f"the undisturbed run failed:\n{(self.root / 'output.txt').read_text()}")
        if self.result("first") != self.result("golden"):
            raise SystemExit("two undisturbed runs differ: this machine cannot tell a lost step from noise")
        return self.result("golden"), time.monotonic() - begin

    def result(self, name: str) -> dict[str, str]:
        """Return hashes of what a finished run has left, and its events without times."""
        hashes, events = left_by(self.root / "runs" / name, STEPS, {"StepDone", "HeldoutDone"})
        return hashes | {"events": json.dumps(events)}

    def attack(self, rounds: int, golden: dict[str, str], seconds: float, deadline: float) -> None:
        """Kill ``rounds`` times, or until ``deadline``."""
        while sum(self.killed.values()) < rounds and time.monotonic() < deadline:
            self.runs += 1
            shutil.rmtree(self.root / "cache")  # so that preparing is killed as well
            name = f"run-{self.runs}"
            while not self.is_done(name, seconds, rounds):
                self.resumed += 1
            if self.result(name) != golden:
                raise SystemExit(f"{self.root / 'runs' / name} ended elsewhere than the undisturbed run")

    def is_done(self, name: str, seconds: float, rounds: int) -> bool:
        """Start the run once and kill it at a random moment, if it is not done before; return whether it is done."""
        if sum(self.killed.values()) >= rounds:
            moment = float("inf")
        else:
            moment = time.monotonic() + self.random.uniform(0, seconds)
        child = self.start(name)
        while time.monotonic() < moment:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if status:
                    raise SystemExit(
                        f"{name} failed with {status}:\n{(self.root / 'output.txt').read_text()[-3000:]}"
                    )
                return True
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.look(name)
        return False

    def look(self, name: str) -> None:
        """Count what the kill has interrupted, and compare what was announced with what is there."""
        run = self.root / "runs" / name
        log = run / "events.jsonl"
        lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
        events = [json.loads(line) for line in lines]
        saved = max((event["step"] for event in events if event["event"] == "CheckpointSaved"), default=0)
        found = (
            newest_good(run / "checkpoints", warn=lambda text: None)
            if list_checkpoints(run / "checkpoints")
            else None
        )
        self.announced += saved > 0
        if saved > (step_of(found) if found else 0):
            self.lost += 1
        is_saving = any((run / "checkpoints").glob(".sft-*-tmp-step-*"))
        last = events[-1]["event"] if events else "nothing logged"
        self.killed["while saving" if is_saving else f"after {last}"] += 1


def main() -> None:
    """Run the experiment and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=3600.0)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import sftcli.services.train.lead

    assert sftcli.services.train.lead
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="monkey-") as folder:
        monkey = Monkey(Path(folder), options.seed)
        golden, seconds = monkey.undisturbed()
        monkey.attack(options.rounds, golden, seconds, begin + options.max_seconds)
    kills = sum(monkey.killed.values())
    sys.stdout.write(
        f"{kills} kills of {monkey.runs} runs of {STEPS} steps ({seconds:.1f} s each), {monkey.resumed} restarts, "
        f"in {time.monotonic() - begin:.0f} s\n"
        f"all {monkey.runs} ended with the weights, optimizer, random state and events of the undisturbed run\n"
        f"{monkey.lost} checkpoints lost of {monkey.announced} looks at a run with an announced one\n"
    )
    for phase, count in monkey.killed.most_common():
        sys.stdout.write(f"  {count:4d} killed {phase}\n")
    sys.exit(1 if monkey.lost else 0)


if __name__ == "__main__":
    main()
