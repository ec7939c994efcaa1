"""Training speed and memory of ``sft`` beside TRL on the same rows, and as a share of this machine's peak.

    python -m benchmarks.train --data rows.jsonl --peer-python ENV/bin/python [--out results.jsonl]
    python -m benchmarks.train --data rows.jsonl --only sft --out results.jsonl      # one measurement at a time
    python -m benchmarks.train --table results.jsonl                                 # the table of all of them

Each measurement has a process of its own and appends one line of JSON. Tokens are counted without padding, and the first
three steps are not timed. TRL runs as it is (padded), grouped by length, packed, and with the best settings that were found:
grouped, in float32, and keeping freed memory. ``--heldout`` adds the loss of held-out rows after the last step, with TRL on the batches of
``sft``. Runs from the root of the project.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import begin_memory, held_bytes, rate_of, seconds_of
from benchmarks.setup import materials_of, trainer_of
from sftcli.data.batches.batch import BatchPlan, ExampleSource
from sftcli.events import NeverStop, StepDone

WARM_UP = 3
PEERS = ("pad", "group", "pack", "best")
# What TRL gains most from where the first steps wait for the system to clear memory, and what `sft` sets for itself.
KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"}


def peak_flops() -> float:
    """Return the matrix-multiply rate of the device in flop/s, in float32 or bfloat16, whichever is faster."""
    return max(rate_of(dtype) for dtype in (torch.bfloat16, torch.float32))


def setting_of(pair: str) -> tuple[str, object]:
    """Return key and value of KEY=VALUE, with numbers and truth values read as such."""
    key, value = pair.split("=", 1)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def measure_sft(args: argparse.Namespace) -> dict[str, object]:
    """Take steps as ``sft train`` does."""
    training = {"max_steps": args.steps} | dict(map(setting_of, args.set))
    peak = peak_flops()
    materials, said = materials_of(**shape(args), training=training)
    with trainer_of(materials, said) as (trainer, model):
        begin_memory()
        steps = [trainer.take_step() for _ in range(WARM_UP)]
        timed: list[StepDone] = []
        seconds = seconds_of(lambda: timed.extend(trainer.take_step() for _ in range(args.steps - WARM_UP)))
        steps += timed
        tokens = sum(step.tokens for step in timed)
        assert trainer.gauge is not None
        needed = trainer.gauge.peak_flops * sum((step.utilization or 0) * step.seconds for step in timed)
        result = {
            "tokens_per_second": tokens / seconds,
            "padding_fraction": 1 - tokens / sum(step.tokens + step.padding_tokens for step in timed),
            "device": str(trainer.device),
            "peak_memory_bytes": held_bytes(),
            "losses": [step.loss for step in steps],
            "peak_fraction": needed / seconds / peak,
            "peak_tflops": peak / 1e12,
            "said": said,
        }
        if args.heldout and trainer.heldout_loss is not None:
            model.eval()
            scored = trainer.heldout_loss(NeverStop())
            result["heldout_loss"] = scored.loss if scored else None
    return result


def measure_peer(args: argparse.Namespace, mode: str) -> dict[str, object]:
    """Run TRL on the same rows, in its own environment."""
    materials, _ = materials_of(**shape(args))
    dataset, folder = materials.prepared.dataset, materials.located.folder
    order: Iterable[int] = range(len(dataset.train))
    if args.heldout:
        training = materials.settings.training
        plan = BatchPlan(
            dataset.train,
            batch_size=training.batch_size,
            micro_batch_size=training.batch_size,
            pad_id=0,
            seed=training.seed,
        )
        order = [index for step in range(args.steps) for index in plan.example_ids(step)]
    with tempfile.TemporaryDirectory() as work:
        rows, heldout = Path(work) / "rows.jsonl", Path(work) / "heldout.jsonl"
        write_rows(rows, dataset.train, order)
        write_rows(heldout, dataset.heldout, range(len(dataset.heldout)))
        command = [args.peer_python, str(Path(__file__).resolve().with_name("peer_trl.py"))]
        command += ["--model", str(folder), "--rows", str(rows), "--mode", mode, "--steps", str(args.steps)]
        command += ["--batch-size", str(args.batch_size), "--max-length", str(args.max_length)]
        if args.heldout:
            command += ["--heldout", str(heldout), "--in-order"]
        environ = os.environ | (KEEP_MEMORY if mode == "best" else {})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=work, env=environ)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_rows(path: Path, examples: ExampleSource, order: Iterable[int]) -> None:
    """Write tokenized rows as TRL reads them."""
    with path.open("w", encoding="utf-8") as file:
        for index in order:
            example = examples[index]
            row = {
                "input_ids": example.input_ids.tolist(),
                "completion_mask": example.loss_mask.astype(int).tolist(),
            }
            file.write(json.dumps(row) + "\n")


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """Return what both tools are given."""
    return {
        "model": args.model,
        "data": args.data,
        "batch_size": args.batch_size,
        "max_tokens": args.max_length,
    }


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the results as lines, with ``sft`` against the fastest mode of TRL on the same rows."""
    by_rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_rows.setdefault(result["data"], []).append(result)
    lines = ["| rows | tool | tokens/s | padding | peak memory | share of peak | held-out loss |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for data, found in by_rows.items():
        for result in found:
            share, loss = result.get("peak_fraction"), result.get("heldout_loss")
            lines.append(
                f"| {data} | {result['tool']} | {result['tokens_per_second']:.0f} | {result['padding_fraction']:.1%} "
                f"| {result['peak_memory_bytes'] / 1e9:.2f} GB | {'' if share is None else f'{share:.0%}'} "
                f"| {'' if loss is None else f'{loss:.4f}'} |"
            )
        ours = [result for result in found if result["tool"] == "sft"]
        peers = [result for result in found if result["tool"] != "sft"]
        if ours and peers:
            best = max(peers, key=lambda result: result["tokens_per_second"])
            speed = ours[-1]["tokens_per_second"] / best["tokens_per_second"]
            memory = ours[-1]["peak_memory_bytes"] / best["peak_memory_bytes"]
            lines.append(f"| {data} | sft / {best['tool']} | {speed:.2f}x | | {memory:.2f}x | | |")
    return "\n".join(lines)


def main() -> None:
    """Measure one tool or all of them, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="rows that sft train reads")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer-python", help="Python of an environment with TRL")
    parser.add_argument("--only", choices=("sft", *PEERS))
    parser.add_argument("--heldout", action="store_true", help="also the loss of held-out rows at the end")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of [training], for sft")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, help="file that the results are added to")
    parser.add_argument("--table", type=Path, help="print the table of such a file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()))
        return
    if args.only is None:  # peak memory is that of a process, so each has its own
        for tool in ("sft", *PEERS):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--only", tool], check=True
            )
        return
    measured = measure_sft(args) if args.only == "sft" else measure_peer(args, args.only)
    tool = "sft" if args.only == "sft" else f"TRL {args.only}"
    line = json.dumps(
        {"data": Path(args.data).name, "tool": tool, "steps": args.steps, "set": args.set} | measured
    )
    print(line)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
