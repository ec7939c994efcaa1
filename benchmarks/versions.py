"""Training speed of this checkout against another one, step by step in turn, so that a busy machine slows both alike.

    git worktree add /tmp/before COMMIT
    python benchmarks/versions.py --other /tmp/before --data rows.jsonl

Each checkout trains in a process of its own; one waits while the other takes a step. Prints the median of the paired ratios
(time of the other one by ours: above 1 is faster now), the best steps, and whether all losses are equal to the last bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WARM_UP = 3
HERE = Path(__file__).resolve()


def main() -> int:
    """Compare two checkouts, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="folder of the other checkout")
    parser.add_argument("--data", required=True, help="rows that sft train reads")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return take_steps(args)
    here, other = (start(checkout, args) for checkout in (HERE.parents[1], args.other.resolve()))
    pairs = [(step(here), step(other)) for _ in range(args.steps + WARM_UP)][WARM_UP:]
    for worker in (here, other):
        worker.stdin.close()
        worker.wait()
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    best = [min(found["seconds"] for found in column) for column in zip(*pairs, strict=True)]
    are_equal = all(ours["loss"] == theirs["loss"] for ours, theirs in pairs)
    print(f"median of {len(ratios)} paired steps: {statistics.median(ratios):.3f} times as fast as the other")
    print(f"scatter {min(ratios):.2f} to {max(ratios):.2f}; best steps {best[0]:.3f} s and {best[1]:.3f} s")
    print(f"losses {'equal to the last bit' if are_equal else 'differ'}")
    return 0


def start(checkout: Path, args: argparse.Namespace) -> Any:
    """Start the process that trains with ``checkout``."""
    words = [
        "--data",
        str(Path(args.data).resolve()),
        "--model",
        args.model,
        "--batch-size",
        str(args.batch_size),
    ]
    return subprocess.Popen(
        [sys.executable, str(HERE), "--worker", *words, "--steps", str(args.steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )


def step(worker: Any) -> dict[str, float]:
    """Let ``worker`` take a step, and return what it says of it."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    found: dict[str, float] = json.loads(worker.stdout.readline())
    return found


def take_steps(args: argparse.Namespace) -> int:
    """Take a step for each line that is read."""
    from benchmarks.setup import materials_of, trainer_of

    materials, said = materials_of(
        model=args.model,
        data=args.data,
        batch_size=args.batch_size,
        training={"max_steps": args.steps + WARM_UP},
    )
    with trainer_of(materials, said) as (trainer, _):
        for _ in sys.stdin:
            taken = trainer.take_step()
            print(json.dumps({"seconds": taken.seconds, "loss": taken.loss}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
