"""Whether the promise of ``sft eval`` about sure answers holds on rows that did not choose the cut.

    sft eval RUN --max-rows 1000
    python -m benchmarks.confidence RUN [RUN ...]

Splits the held-out answers of each run (``eval.json``) into halves, 100 times: the first half chooses the cut, the second one is
looked at. Prints in how many splits the share of wrong answers above the cut is within its bound there, and the same for
confidences that were shuffled, in which no cut below the share of all wrong answers should be found.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from sftcli.services.evaluate.confidence import WRONG_SHARES, find_cuts

SPLITS = 100


def main() -> None:
    """Split the answers of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluated run")
    for run in parser.parse_args().runs:
        found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        answers, measure = found["answers"], found["confidence"]["measure"]
        confidence = np.array([answer["confidence"] for answer in answers])
        right = np.array([answer["passed"][measure] for answer in answers])
        print(f"{run.name}: {len(right)} answers, {right.mean():.1%} right ({measure})")
        for name, values in (("as they are", confidence), ("shuffled", None)):
            print(f"  {name}")
            report(values, confidence, right)


def report(values: np.ndarray | None, confidence: np.ndarray, right: np.ndarray) -> None:
    """Print one line for each share of wrong answers; ``values`` None shuffles the confidences."""
    generator = np.random.default_rng(0)
    kept, found, shares = (dict.fromkeys(WRONG_SHARES, 0.0) for _ in range(3))
    for _ in range(SPLITS):
        sure = generator.permutation(confidence) if values is None else values
        order = generator.permutation(len(right))
        chosen, seen = order[: len(right) // 2], order[len(right) // 2 :]
        for cut in find_cuts(sure[chosen].tolist(), right[chosen].tolist()):
            out = right[seen][sure[seen] >= cut.confidence] if cut.confidence is not None else right[:0]
            found[cut.wrong_at_most] += cut.confidence is not None
            shares[cut.wrong_at_most] += len(out) / len(seen) / SPLITS
            kept[cut.wrong_at_most] += not len(out) or 1 - out.mean() <= cut.wrong_at_most
    for share in WRONG_SHARES:
        print(
            f"    wrong at most {share:3.0%}: a cut in {found[share]:3.0f} of {SPLITS} splits, {shares[share]:4.0%} answered on "
            f"average; the bound holds on the other half in {kept[share]:3.0f}"
        )


if __name__ == "__main__":
    main()
