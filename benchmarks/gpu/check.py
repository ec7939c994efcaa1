"""Run the stages one after the other, each in a process of its own, within a budget of seconds; print what matters last.

    python -m benchmarks.gpu.check --part first     # env, correct, speed: six minutes
    python -m benchmarks.gpu.check --part second    # trl, cli, decode: four
    python -m benchmarks.gpu.check --device cpu [--only env,correct]

Runs from the root of the checkout. Each result is a line of JSON with a verdict in ``results.jsonl`` of ``--out`` ($OUT where that is
set, else ``gpu-check-out``), which the first part begins anew and the others go on with; all that was printed is in ``log.txt``, small
models and runs in the folder ``work``. Exits with 1 where a verdict is not ok or a stage did not end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from benchmarks.gpu.summary import BAD, print_summary

_CARRIED = Path("gpu-tokenizer")  # laid there by carry.sh
_CPU_SECONDS = 1800.0
_TESTS = ("tests/gpu", "tests/equivalence", "tests/unit/training", "tests/unit/modeling/kernels")
_MARKS = "not (slow or crash or scripts)"  # those marked gpu too


@dataclass(frozen=True, slots=True)
class Seconds:
    """The fewest that a stage is begun with, and the most that it gets."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Part:
    """What one command runs, and for how long in all."""

    stages: tuple[str, ...]
    budget: float


LIMITS = {
    "env": Seconds(10, 60), "correct": Seconds(40, 130), "speed": Seconds(60, 200), "trl": Seconds(30, 100),
    "cli": Seconds(40, 110), "decode": Seconds(20, 60), "compiled": Seconds(60, 200), "pytest": Seconds(40, 170),
}  # fmt: skip
PARTS = {
    "first": Part(("env", "correct", "speed"), 345),
    "second": Part(("trl", "cli", "decode"), 225),
    "third": Part(("compiled", "pytest"), 370),
}


def main() -> int:
    """Run them and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=PARTS, help="the stages of one command, with its budget")
    parser.add_argument("--only", help="these stages, by commas; all if neither is given")
    parser.add_argument("--budget", type=float, help="seconds for all stages; a CPU has no limit")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "gpu-check-out")
    parser.add_argument("--tokenizer", type=Path, default=_CARRIED if _CARRIED.is_dir() else None)
    args = parser.parse_args()
    part = PARTS.get(args.part, Part(tuple(LIMITS), sum(each.budget for each in PARTS.values())))
    stages = args.only.split(",") if args.only else part.stages
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if args.part in (None, "first"):
        results.unlink(missing_ok=True)
    begin = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        for index, stage in enumerate(stages):
            left = (args.budget or part.budget) - (time.monotonic() - begin)
            seconds = given(stage, stages[index + 1 :], left)
            if args.device == "cpu":
                seconds = _CPU_SECONDS
            _run(stage, _command(stage, args, out), results, log, seconds=seconds)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    print(f"\n==== {time.monotonic() - begin:.0f} s ====")
    bad = print_summary(
        lines,
        is_cuda=args.device == "cuda",
        has_all=set(PARTS["second"].stages) <= {line["stage"] for line in lines},
    )
    return int(bad > 0)


def given(stage: str, later: tuple[str, ...] | list[str], left: float) -> float:
    """Return the seconds that ``stage`` gets of those that are ``left``: the ``later`` ones keep what they begin with."""
    kept = sum(LIMITS[one].least for one in later)
    seconds = min(LIMITS[stage].most, left - kept)
    return seconds if seconds >= LIMITS[stage].least else 0.0


def _command(stage: str, args: argparse.Namespace, out: Path) -> list[str]:
    if stage == "pytest":
        tests, processes = (_TESTS, "8") if args.device == "cuda" else (_TESTS[:1], "0")
        words = (
            f"pytest -q -n {processes} -p no:cacheprovider -o filterwarnings=default --tb=line -rs -m".split()
        )
        return [sys.executable, "-m", *words, _MARKS, *tests]
    words = f"benchmarks.gpu.stage {stage} --device {args.device}".split()
    words += ["--out", str(out), "--work", str(out / "work")]
    return [sys.executable, "-m", *words, *(("--tokenizer", str(args.tokenizer)) if args.tokenizer else ())]


def _run(stage: str, command: list[str], results: Path, log: BinaryIO, *, seconds: float) -> None:
    """Run ``command`` for ``seconds`` at most, with all that it writes in ``log``, and add to ``results`` how it ended."""
    begin, code = time.monotonic(), None
    if seconds:
        code = _ended(command, log, seconds=seconds)
    took = time.monotonic() - begin
    was_cut = code == -signal.SIGKILL and took >= int(seconds)
    verdict = {None: "LEFT OUT", 0: "ok"}.get(code, "CUT" if was_cut else "FAIL")
    line = {"stage": stage, "name": "the stage ends", "verdict": verdict, "rc": code, "seconds": took}
    if verdict in BAD:
        line["given"] = seconds
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"[{stage}] {verdict}: rc {code} after {took:.0f} s of {seconds:.0f}", flush=True)


def _ended(command: list[str], log: BinaryIO, *, seconds: float) -> int:
    """Run ``command`` and return its exit code; what it has started is killed with it after ``seconds``."""
    environ = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    ) as process:
        assert process.stdout is not None
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.alarm(int(seconds) or 1)
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith(b"[") or b"passed" in line or b"FAILED" in line:
                    print(line.decode(errors="replace").rstrip()[:400], flush=True)
            return process.wait()
        finally:
            signal.alarm(0)


if __name__ == "__main__":
    sys.exit(main())
