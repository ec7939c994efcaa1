"""Stop real trainings at random moments in every way that a run can be stopped, go on with them until they are done, and compare
with runs that were left in peace.

    python -m tests.crash.stops --runs 40

Full weights and adapters take turns, `training.precision` is auto, and two programs beside keep the processors busy. In every second
run each start after the first that decided would decide for the other precision. Weights, optimizer, random state, counters and logged numbers
of the end must be those of the undisturbed run, bit for bit.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sftcli.training.checkpoint.names import list_checkpoints
from tests.support.runs import left_by, write_rows
from tests.support.tiny_model import build_tiny_model

STEPS = 24
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
STOPPED = {0, 75, *(128 + number for number in SIGNALS)}
ADAPTER = ("adapter.rank=4", "adapter.dropout=0.1")
FORMS = {"full": (), "lora": ("adapter.kind=lora", *ADAPTER), "dora": ("adapter.kind=dora", *ADAPTER)}
TURNS = ("full", "lora", "full", "dora")
LOGGED = {"StepDone", "HeldoutDone", "Judged", "MemoryEased", "FitEnded"}
# Loaded once, in the parent.
LOADED = (
    "sftcli.cli.app",
    "sftcli.cli.views.live",
    "sftcli.services.train.lead",
    "sftcli.services.train.resume",
    "peft",
    "pandas",
    "matplotlib.figure",
)


@dataclass
class Stops:
    """One experiment in ``root``."""

    root: Path
    seed: int
    max_stops: int = 3  # of one run
    stopped: Counter[str] = field(default_factory=Counter)  # signal -> times
    starts: int = 0
    equal: int = 0

    def __post_init__(self) -> None:
        os.environ |= {
            "SFT_CACHE_DIR": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.random = random.Random(self.seed)
        self.model = build_tiny_model(self.root / "model", dropout=0.1)
        self.rows = write_rows(self.root / "rows.jsonl", 60)

    def start(self, name: str, form: str, *, is_contrary: bool = False) -> int:
        """Fork a child that trains or goes on; return its process id."""
        run = self.root / "runs" / name
        sets = (
            f"run.root={self.root / 'runs'}", "training.batch_size=4", "training.learning_rate=1e-2", "training.precision=auto",
            "data.heldout_fraction=0.2", "training.eval_every_steps=4", "checkpoint.every_steps=5", "training.eval_answers=2",
            *FORMS[form],
        )  # fmt: skip
        argv = [
            "sft", "train", "--data", str(self.rows), "--model", str(self.model), "--run", name, "--resume", "auto",
            "--max-steps", str(STEPS), "--quiet", *(word for value in sets for word in ("--set", value)),
        ]  # fmt: skip
        if (
            list_checkpoints(run / "checkpoints")
            and not (run / "final").exists()
            and self.random.random() < 0.5
        ):
            argv = ["sft", "resume", str(run), "--quiet"]
        self.starts += 1
        has_decided = (run / "run.json").exists() and "decisions" in (run / "run.json").read_text("utf-8")
        return forked(argv, self.root / "output.txt", draw_otherwise if is_contrary and has_decided else None)

    def result(self, name: str) -> dict[str, object]:
        """Return what a finished run has left, without what a clock decides."""
        run = self.root / "runs" / name
        last = run / "checkpoints" / f"step-{STEPS:08d}"
        hashes, events = left_by(run, STEPS, LOGGED)
        return {
            "state": json.loads((last / "state.json").read_text(encoding="utf-8"))["state"],
            "decisions": json.loads((run / "run.json").read_text(encoding="utf-8"))["decisions"],
            "events": events,
        } | hashes

    def undisturbed(self, form: str) -> tuple[dict[str, object], float]:
        """Train to the end; return the result and the seconds it took."""
        begin = time.monotonic()
        _, status = os.waitpid(self.start(form, form), 0)
        if status:
            raise SystemExit(f"the undisturbed run failed:\n{self.output()}")
        return self.result(form), time.monotonic() - begin

    def disturb(self, name: str, form: str, seconds: float, *, is_contrary: bool) -> dict[str, object]:
        """Train a run to its end through up to ``max_stops`` stops, and one at least; return what it has left."""
        planned, stops = self.random.randint(1, self.max_stops), 0
        while stops < planned:
            if (self.root / "runs" / name / "final").exists():
                if stops:
                    break
                shutil.rmtree(self.root / "runs" / name)  # it was never stopped
            child = self.start(name, form, is_contrary=is_contrary)
            self.wait_for_a_moment(name, seconds)
            number = self.random.choice(SIGNALS)
            os.kill(child, number)  # a child that is done already is a zombie, which does not mind
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code:
                stops += 1
                self.stopped[number.name] += 1
            if (code if code >= 0 else 128 - code) not in STOPPED:
                raise SystemExit(f"{name} ended with {code} on {number.name}:\n{self.output()}")
        while not (self.root / "runs" / name / "final").exists():
            _, status = os.waitpid(self.start(name, form, is_contrary=is_contrary), 0)
            if status:
                raise SystemExit(f"{name} failed with {os.waitstatus_to_exitcode(status)}:\n{self.output()}")
        return self.result(name)

    def wait_for_a_moment(self, name: str, seconds: float) -> None:
        """Wait for a random part of a run, or for a step and a little more."""
        log = self.root / "runs" / name / "events.jsonl"
        wanted = f'"step": {self.random.randint(1, STEPS)},' if self.random.random() < 0.5 else ""
        end = time.monotonic() + (4 * seconds if wanted else self.random.uniform(0, seconds))
        while time.monotonic() < end:
            if wanted and log.exists() and wanted in log.read_text(encoding="utf-8", errors="replace"):
                time.sleep(self.random.uniform(0, 0.05))
                return
            time.sleep(0.002)

    def output(self) -> str:
        """Return the end of what the children printed."""
        return (self.root / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]


def draw_otherwise() -> None:
    """Let this process measure, if it measures at all, that the other precision is the faster one."""
    from sftcli.services.machine.precision import Precision, decide_precision
    from sftcli.services.train import decisions

    def contrary(setting: str, device: object) -> Precision:
        found = decide_precision(setting, device)  # type: ignore[arg-type]
        return Precision(name="fp32" if found.name == "bf16" else "bf16", why="drawn")

    decisions.decide_precision = contrary


def forked(argv: Sequence[str], output: Path, prepare: Callable[[], None] | None) -> int:
    """Fork a child that runs a command, so that torch is imported once; return its process id."""
    child = os.fork()
    if child:
        return child
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [*argv]
    code: object = 1
    try:  # what ends the child must not unwind the parent's part of its stack
        if prepare is not None:
            prepare()
        from sftcli.cli.app import main

        main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        os._exit(code if isinstance(code, int) else 1)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Let ``count`` programs multiply matrices meanwhile."""
    import torch

    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            matrix = torch.ones(512, 512)
            while os.getppid() != 1:
                _ = matrix @ matrix
            os._exit(0)
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> None:
    """Run the experiment and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-stops", type=int, default=3, help="of one run")
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--max-seconds", type=float, default=3600.0)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for name in LOADED:
        importlib.import_module(name)
    begin = time.monotonic()
    done, different = 0, []
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        stops = Stops(Path(folder), options.seed, options.max_stops)
        golden = {form: stops.undisturbed(form) for form in dict.fromkeys(TURNS[: options.runs])}
        with busy(options.busy):
            while done < options.runs and time.monotonic() < begin + options.max_seconds:
                form, is_contrary = TURNS[done % len(TURNS)], done % 4 >= 2
                name = f"{done}-{form}"
                wanted, seconds = golden[form]
                found = stops.disturb(name, form, seconds, is_contrary=is_contrary)
                other = [key for key in wanted if wanted[key] != found.get(key)]
                if other:
                    different.append(f"{name}: {', '.join(other)}")
                done += 1
    signals = ", ".join(f"{count} {name}" for name, count in stops.stopped.most_common())
    sys.stdout.write(
        f"{done - len(different)} of {done} runs ended as the undisturbed one, through {signals} "
        f"and {stops.starts} starts of {STEPS} steps, in {time.monotonic() - begin:.0f} s\n"
    )
    for line in different:
        sys.stdout.write(f"  differs: {line}\n")
    sys.exit(1 if different or done < options.runs else 0)


if __name__ == "__main__":
    main()
