"""What padding costs, and what packing does about it: forward and backward passes of the same rows, laid out in turn.

    python benchmarks/packing.py --model FOLDER --data rows.jsonl [--batch-size 8] [--steps 2] [--precision bf16]

Prints tokens per second without padding, the share of padding, and passes a step, as a table in Markdown. The layouts take
turns, the first round is not counted. No text of a row is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sftcli.data.batches.batch import Batch, BatchPlan, Packing, collate
from sftcli.data.batches.packing import group_alike
from sftcli.data.prepared.store import ExampleTable, open_prepared
from sftcli.modeling.kernels.document_attention import attend_as_before, attend_by_document
from sftcli.modeling.load import load_model
from sftcli.runtime import choose_device, choose_dtype
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights.masters import MasterWeights

Window = Callable[[int], list[Batch]]
BY_DOCUMENT = "packed, by document"


def main() -> None:
    """Time every layout and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--data", required=True, help="rows")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument(
        "--pass-positions", type=int, nargs="*", default=[], help="other prices of a pass to try"
    )
    arguments = parser.parse_args()
    rows, device = prepared_rows(arguments), choose_device()
    model = load_model(arguments.model, dtype=torch.float32, device=device)
    weights = MasterWeights(model, compute_dtype=choose_dtype(arguments.precision, device))
    layouts = layouts_of(rows, arguments)
    seconds = dict.fromkeys(layouts, 0.0)
    for round_ in range(arguments.rounds + 1):
        for name, window in layouts.items():
            if name == BY_DOCUMENT and not attend_by_document(model):
                raise SystemExit("this model has no attention by document")
            begin = time.perf_counter()
            for step in range(arguments.steps):
                for batch in window(step):
                    nll = response_nll_sum(model, batch.to(device))
                    (nll / batch.response_tokens).backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - begin) if round_ else 0.0
            attend_as_before(model)
            for master in weights.masters.values():
                master.grad = None
    lengths = rows.num_tokens
    print(f"{len(rows)} rows of {sum(lengths) / len(lengths):.0f} tokens, at most {max(lengths)}; {device}")
    print("| layout | tokens/s | padding | passes a step |\n|---|--:|--:|--:|")
    for name, window in layouts.items():
        batches = [batch for step in range(arguments.steps) for batch in window(step)]
        tokens = sum(batch.tokens for batch in batches)
        share = 1 - tokens / sum(batch.input_ids.numel() for batch in batches)
        speed = tokens * arguments.rounds / seconds[name]
        print(f"| {name} | {speed:.0f} | {share:.1%} | {len(batches) / arguments.steps:.1f} |")


def layouts_of(rows: ExampleTable, arguments: argparse.Namespace) -> dict[str, Window]:
    """Return the passes of a step by the name of the layout."""
    size, longest = arguments.micro_batch_size, max(rows.num_tokens)

    def plan(packing: Packing | None = None) -> BatchPlan:
        return BatchPlan(
            rows, batch_size=arguments.batch_size, micro_batch_size=size, pad_id=0, seed=0, packing=packing
        )

    def grouped(price: int) -> Window:
        def window(step: int) -> list[Batch]:
            ids = plan().example_ids(step)
            groups = group_alike([rows.num_tokens[index] for index in ids], size, pass_positions=price)
            return [
                collate([rows[ids[place]] for place in group], example_ids=group, pad_id=0)
                for group in groups
            ]

        return window

    return {
        "padded, fewest passes": grouped(10**9),
        "padded, like lengths": plan().window,
        **{f"padded, a pass is worth {price}": grouped(price) for price in arguments.pass_positions},
        "packed, by mask": plan(Packing(row_tokens=longest, rows=size)).window,
        BY_DOCUMENT: plan(Packing(row_tokens=size * longest)).window,
    }


def prepared_rows(arguments: argparse.Namespace) -> ExampleTable:
    """Prepare the rows, or find them in the cache."""
    command = [sys.executable, "-m", "sftcli", "prepare", arguments.data, "--model", str(arguments.model)]
    command += ["--max-tokens", str(arguments.max_tokens), "--set", "data.heldout_fraction=0", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return open_prepared(Path(json.loads(ended.stdout)["folder"])).train


if __name__ == "__main__":
    main()
