"""Attention of one document on a CPU: what forward and backward cost in bfloat16, and the backward pass in float32.

    OMP_NUM_THREADS=2 python -m benchmarks.attention

The heads are those of SmolLM2-135M. ``sft`` runs the backward pass of short documents in float32, casts included.
"""

import time
from collections.abc import Callable

import torch

from sftcli.modeling.kernels.cpu_attention import BACKWARD, FORWARD

HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64


def milliseconds(work: Callable[[], object], times: int = 12) -> float:
    """Return the lower quartile of some runs."""
    work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[times // 4] * 1e3


def main() -> None:
    """Print a line per length."""
    print(f"{'tokens':>7}{'forward':>10}{'backward':>11}{'in float32':>13}  (ms)")
    for length in (32, 64, 128, 256, 384, 512, 768, 1024, 2048):
        rows = torch.randn(1, length, HEADS + 2 * KV_HEADS, HEAD_SIZE).bfloat16().transpose(1, 2)
        parts = rows.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        seen, weights = FORWARD(*parts, 0.0, True)
        gradient = torch.randn_like(seen)

        def widened() -> list[torch.Tensor]:
            wide = [part.float() for part in (gradient, *parts, seen)]  # noqa: B023
            return [part.bfloat16() for part in BACKWARD(*wide, weights, 0.0, True)]  # noqa: B023

        forward = milliseconds(lambda: FORWARD(*parts, 0.0, True))  # noqa: B023
        backward = milliseconds(lambda: BACKWARD(gradient, *parts, seen, weights, 0.0, True))  # noqa: B023
        print(f"{length:>7}{forward:>10.2f}{backward:>11.2f}{milliseconds(widened):>13.2f}", flush=True)


if __name__ == "__main__":
    main()
