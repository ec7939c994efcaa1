"""The stage ``cli``: what a user types, each command in a process of its own."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.findings import Check
from benchmarks.gpu.subjects import CPU, model_of
from tests.support.smollm2 import VOCABULARY, lay_tokenizer

_TEXT = (
    "the ferry leaves harbour seven returns before evening bell please write short answer question give one reason list "
    "holds three names longest first system message tells assistant speak user sort numbers from small to large"
)
_SECONDS, _SECONDS_ON_CPU = 100, 800  # of a command
_ON_CUDA = {"qlora": "it needs CUDA", "adamw_8bit": "it needs CUDA", "fp16": "a CPU takes minutes for a step"}
_PLANNED = (0.85, 1.15)  # parts of the peak of the run


def run_commands(check: Check) -> None:
    """Train, go on, train adapters and with 8-bit moments, ask each, and compare the plan with the run."""
    with check.guarded("env"):
        _check_env(check)
    common, root = _prepare(check, "tiny")
    with check.guarded("train"):
        _judge(check, "sft train", [["train", *common, "--run", "whole"]])
    with check.guarded("verify"):
        name = "sft resume --verify: the second half again, bit for bit"
        _judge(check, name, [["resume", str(root / "whole"), "--verify"]])
    kinds = {
        "lora": ["--adapter", "lora"],
        "qlora": ["--adapter", "qlora"],
        "adamw_8bit": ["--set", "training.optimizer=adamw_8bit"],
        "fp16": ["--set", "training.precision=fp16"],
        "not deterministic, TF32": ["--set", "training.deterministic=false", "--set", "training.tf32=true"],
    }
    for kind, words in kinds.items():
        if check.device.type != "cuda" and kind in _ON_CUDA:
            check.leave_out(f"sft train and generate, {kind}", _ON_CUDA[kind])
            continue
        with check.guarded(kind):
            ask = ["generate", "hello", "--checkpoint", str(root / _run_name(kind)), "--max-new-tokens", "8"]
            _judge(
                check,
                f"sft train and generate, {kind}",
                [["train", *common, *words, "--run", _run_name(kind)], ask],
            )
    with check.guarded("plan"):
        # Of a tiny model the least that CUDA hands out is a large part.
        common, root = _prepare(check, "tiny" if check.is_small else "smol")
        _judge(check, "sft train, for its memory", [["train", *common, "--run", "planned"]])
        _check_plan(check, common, root / "planned")


def _run_name(kind: str) -> str:
    return kind.replace(", ", "-").replace(" ", "-")


def _check_env(check: Check) -> None:
    done = _sft(check, ["env", "--json"])
    facts = json.loads(done.stdout) if done.returncode == 0 else {}
    wanted = {"torch", "precision", "device"} | (
        {"gpu memory", "cuda", "driver"} if not check.is_small else set()
    )
    missing = sorted(wanted - facts.keys())
    check.judge(
        "sft env names the device",
        not (done.returncode or missing),
        missing=missing,
        device=facts.get("device"),
    )


def _prepare(check: Check, kind: str) -> tuple[list[str], Path]:
    """Write rows and a model; return what every training is told, and where runs go."""
    rows, model, root = check.work / "rows.jsonl", check.work / kind, check.work / "runs"
    generator = random.Random(0)
    with rows.open("w", encoding="utf-8") as file:
        for index in range(120 if check.is_small else 600):
            first, second = (
                " ".join(
                    generator.choices(_TEXT.split(), k=min(600, int(generator.lognormvariate(4.3, 0.7))) + 5)
                )
                for _ in range(2)
            )
            file.write(json.dumps({"prompt": f"{index} {first}", "response": second}) + "\n")
    model_of(kind, device=CPU, vocabulary=VOCABULARY).save_pretrained(model)
    lay_tokenizer(model, check.tokenizer)
    settings = (
        f"run.root={root}", "training.batch_size=16", "training.micro_batch_size=8", "training.warmup_steps=0",
        "training.learning_rate=1e-3", "training.eval_every_steps=0", "training.max_steps=8", "checkpoint.every_steps=4",
    )  # fmt: skip
    words = ["--model", str(model), "--data", str(rows)]
    return words + [word for setting in settings for word in ("--set", setting)], root


def _judge(check: Check, name: str, commands: list[list[str]]) -> None:
    """Run ``commands`` up to the first that fails, and say whether none did."""
    codes, seconds, tail = [], [], ""
    for command in commands:
        begin = time.perf_counter()
        done = _sft(check, command)
        codes.append(done.returncode)
        seconds.append(time.perf_counter() - begin)
        if done.returncode:
            tail = (done.stdout + done.stderr)[-600:]
            break
    check.judge(name, not any(codes), rc=codes, seconds=seconds, tail=tail)


def _sft(check: Check, words: list[str]) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sftcli", *words]
    seconds = _SECONDS_ON_CPU if check.is_small else _SECONDS
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ, check=False)


def _check_plan(check: Check, common: list[str], run: Path) -> None:
    done = _sft(check, ["train", *common, "--plan", "--json"])
    planned = json.loads(done.stdout)["peak_bytes"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = max(event.get("peak_memory_bytes", 0) for event in events)
    ratio, (lowest, highest) = planned / peak, _PLANNED
    name, facts = (
        "sft train --plan tells the peak of the run",
        {"planned_GB": planned / 1e9, "run_GB": peak / 1e9},
    )
    if check.device.type == "cuda":
        check.judge(name, lowest < ratio < highest, ratio=ratio, **facts)
    else:
        check.leave_out(
            name, "the memory of a process depends on how many steps there were", ratio=ratio, **facts
        )
