"""Files that this program has written: each of them, and the commands that read it back."""

import hashlib
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

from sftcli import storage
from sftcli.config.resolve import parse_set, resolve
from sftcli.runtime import processor
from sftcli.services.machine.precision import MEASUREMENTS, REMEMBERED, Measured
from tests.fuzz.runner import run_sft, sft_in_child, start_sft
from tests.fuzz.targets import Target
from tests.support.forked import run_forked
from tests.support.runs import StopAtStep, train, write_rows
from tests.support.tiny_model import build_tiny_model

_SETS = (
    "training.batch_size=4", "training.learning_rate=1e-2", "training.eval_every_steps=2", "training.precision=fp32",
    "data.heldout_fraction=0.2", "checkpoint.every_steps=2",
)  # fmt: skip
_FLAGS = " ".join(f"--set {value}" for value in _SETS)
TRAIN = f"train -q --data rows.jsonl {_FLAGS}"
_SIZES = f"{TRAIN} --model model --max-steps 2 --compare rows=50%,100% --run sizes"
ASK = "generate -q -m first --max-new-tokens 2"
_ANSWER = "generate -q --file prompts.jsonl --out answers.jsonl -m first --max-new-tokens 2"


def make_runs(folder: Path) -> None:
    """A finished run that was scored, one that was stopped, one of an adapter that trains on from the first."""
    build_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Hi {n}"}) + "\n" for n in range(12)), encoding="utf-8"
    )
    sft_in_child(f"{TRAIN} --model model --max-steps 4 --run first")
    sft_in_child("eval -q first --max-rows 3")
    sft_in_child(f"{TRAIN} --model first --max-steps 2 --lora --rank 2 --replay 20% --run second")
    sft_in_child("export -q first --to hf --out exported")
    machine = hashlib.sha256(processor().encode()).hexdigest()
    MEASUREMENTS.write(folder / "cache" / REMEMBERED, {machine: Measured(precision="fp32", why="measured")})
    _stopped_run()


def make_comparison(folder: Path) -> None:
    """A comparison of which one run is done."""
    build_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    _kill_when(_SIZES, lambda: '"scored": {\n    "' in _text(folder / "runs" / "sizes" / "compare.json"))


def make_answers(folder: Path) -> None:
    """A file of answers that was not ended, with the journal of those that are known."""
    make_runs(folder)

    def work() -> None:
        append, count = storage.append_line, itertools.count()

        def append_or_die(file: BinaryIO, line: str) -> None:
            if next(count) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, line)

        storage.append_line = append_or_die
        run_sft(_ANSWER)

    assert run_forked(work) == -signal.SIGKILL


def _stopped_run() -> None:
    overrides = (
        *_SETS,
        "data.sources=rows.jsonl",
        "model.name=model",
        "training.max_steps=6",
        "run.name=half",
    )
    resolved = resolve(preset=None, config_file=None, overrides=tuple(map(parse_set, overrides)), environ={})
    train(resolved, StopAtStep(4))


def _kill_when(command: str, is_there: object) -> None:
    assert callable(is_there)
    child = start_sft(command)
    while not is_there():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"sft {command} ended too early")
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


_LOOK = ("runs", "runs --json", "show", "report -q --out page.html")
_FIRST = (
    *_LOOK, "show first", "show first --json", "report -q first", "report -q first half --out both.html", "diff first half",
    "diff first second --json", "generate Hi -q -m first --max-new-tokens 2", "eval -q first --max-rows 2",
    "eval -q first --no-base --max-rows 2", "export -q first --to hf --out out", f"{TRAIN} --model first --max-steps 2 --run third",
    "resume first", "resume -q first --max-steps 6",
)  # fmt: skip
_HALF = (
    *_LOOK, "show half", "resume -q half", "resume -q", "resume half --verify", "resume -q half --checkpoint 2",
    f"{TRAIN} --model model --max-steps 6 --run half --resume auto", "diff half first", "generate Hi -q -m half --max-new-tokens 2",
    "eval -q half --no-base --max-rows 2",
)  # fmt: skip
_SECOND = (
    *_LOOK, "show second", "report -q second", "diff second first", "generate Hi -q -m second --max-new-tokens 2",
    "export -q second --to hf --out out", "resume -q second --max-steps 4", f"{TRAIN} --model second --max-steps 2 --run third",
    "eval -q second --max-rows 2",
)  # fmt: skip
_AGAIN = f"{TRAIN} --model model --max-steps 2 --run third"
_ANSWERS = (
    _ANSWER,
    "generate -q --file prompts.jsonl --out answers.jsonl -m first --max-new-tokens 2 --json",
)


def _of_run(run: str, file: str, commands: tuple[str, ...], name: str = "") -> Target:
    return Target(name=name or f"{run}/{file}", make=make_runs, file=f"runs/{run}/{file}", commands=commands)


OWN = (
    *(
        _of_run("first", name, _FIRST)
        for name in ("run.json", "config.toml", "origins.json", "data.json", "events.jsonl")
    ),
    *(
        _of_run("half", name, _HALF)
        for name in ("run.json", "config.toml", "origins.json", "data.json", "events.jsonl")
    ),
    *(_of_run("second", name, _SECOND) for name in ("run.json", "earlier/manifest.json")),
    _of_run("second", "final/sft_base.json", _SECOND, "adapter base"),
    _of_run(
        "first",
        "eval.json",
        (
            *_FIRST,
            "eval -q half --against first --max-rows 2",
            "eval -q first --against runs/first/eval.json --max-rows 2",
        ),
    ),
    _of_run("half", "training.log", _HALF),
    _of_run("half", "checkpoints/step-00000004/state.json", _HALF, "checkpoint state"),
    _of_run("half", "checkpoints/step-00000004/manifest.json", _HALF, "checkpoint manifest"),
    Target(
        name="run mark",
        make=make_runs,
        file="exported/sft_run.json",
        commands=(
            f"{TRAIN} --model exported --max-steps 2 --run third",
            "generate Hi -q -m exported --max-new-tokens 2",
        ),
    ),
    Target(
        name="prepared manifest",
        make=make_runs,
        file="cache/prepared/*/manifest.json",
        commands=(
            _AGAIN,
            "prepare -q rows.jsonl --model model --set data.heldout_fraction=0.2",
            "eval -q first --max-rows 2",
            *_HALF,
        ),
    ),
    Target(
        name="precision",
        make=make_runs,
        file="cache/precision.json",
        commands=(
            "train -q --data rows.jsonl --model model --max-steps 1 --batch-size 4 --run third --set training.precision=auto",
            "generate Hi -q -m first --max-new-tokens 2 --precision auto",
        ),
    ),
    Target(
        name="comparison",
        make=make_comparison,
        file="runs/sizes/compare.json",
        commands=("runs", "runs --json", f"{_SIZES} --resume auto"),
    ),
    Target(name="answers", make=make_answers, file=".answers.jsonl.partial", commands=_ANSWERS),
    Target(name="answers lock", make=make_answers, file=".sft-*-out-lock", commands=_ANSWERS),
)
