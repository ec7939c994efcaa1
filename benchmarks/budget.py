"""Whether trainings of a given time end in that time, with their schedule at its end, beside a process that keeps a core busy.

    python -m benchmarks.budget --runs 10 --minutes 3

Each line is a run: its steps, the time of the whole command by an outer clock, its share of the time that was given, and the
learning rate of the last step as a share of the peak. The last line counts those within ten percent.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WITHIN = 0.1  # of the time


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    steps: int
    last_step: int
    seconds: float
    last_rate: float  # as a share of the peak

    def is_good(self, minutes: float) -> bool:
        """Return whether it took about ``minutes`` and its schedule is at its end."""
        is_in_time = abs(self.seconds / (60 * minutes) - 1) <= WITHIN
        return is_in_time and self.steps == self.last_step


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def train(minutes: float, more: list[str]) -> Ended:
    """Train for ``minutes`` and return how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        time_flag = ["--max-time", f"{round(60 * minutes)}s", "--runs", folder, "--run", "one"]
        command = [sys.executable, "-m", "sftcli", "train", *time_flag, "--quiet", *more]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        lines = (Path(folder) / "one" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "StepDone"]
    last_step = next(event["last_step"] for event in events if event["event"] == "FitStarted")
    rates = [event["learning_rate"] for event in steps]
    return Ended(
        steps=steps[-1]["step"], last_step=last_step, seconds=seconds, last_rate=rates[-1] / max(rates)
    )


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy each")
    asked, more = parser.parse_known_args()
    found = []
    with busy(asked.busy):
        for number in range(1, asked.runs + 1):
            ended = train(asked.minutes, more)
            found.append(ended)
            load = os.getloadavg()[0]
            print(
                f"run {number}  {ended.steps} of {ended.last_step} steps  {ended.seconds:.0f} s  "
                f"{ended.seconds / (60 * asked.minutes):.0%}  last rate {ended.last_rate:.1%} of the peak  load {load:.1f}",
                flush=True,
            )
    good = sum(ended.is_good(asked.minutes) for ended in found)
    print(
        f"{good} of {len(found)} runs within {WITHIN:.0%} of {asked.minutes:g} minutes, schedule at its end"
    )


if __name__ == "__main__":
    main()
