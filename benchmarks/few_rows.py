"""Weights that a product of one row reads in a second and core, by the form of the weights::

    python -m benchmarks.few_rows

Processor time of one thread on matrices that stay in the cache, the best of 60, so that other work on the machine counts little.
"""

import time
from collections.abc import Callable

import torch

from sftcli.modeling.decoding.products import MakeProduct, _halves, _plain

SHAPES = ((576, 576), (960, 576), (3072, 576), (576, 1536))  # of SmolLM2-135M, its projections joined
WAYS: dict[str, tuple[MakeProduct, torch.dtype]] = {
    "float32": (_plain, torch.float32),
    "bfloat16": (_plain, torch.bfloat16),
    "float16 by FBGEMM": (_halves, torch.float32),
}
_TIMES, _ROUNDS = 8, 60


def main() -> None:
    """Print a line per shape."""
    torch.set_num_threads(1)
    print(f"{'G weights/s':<14}" + "".join(f"{name:>20}" for name in WAYS))
    for shape in SHAPES:
        weight, row = torch.randn(shape).bfloat16(), torch.randn(1, shape[1])
        rates = [
            weight.numel() / seconds(make(weight.to(dtype), None), row.to(dtype))
            for make, dtype in WAYS.values()
        ]
        print(
            f"{shape[0]} x {shape[1]}".ljust(14) + "".join(f"{rate / 1e9:>20.1f}" for rate in rates),
            flush=True,
        )


@torch.inference_mode()
def seconds(product: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor) -> float:
    """Return what a product takes."""
    taken = []
    for _ in range(_ROUNDS):
        begin = time.thread_time()
        for _ in range(_TIMES):
            product(row)
        taken.append((time.thread_time() - begin) / _TIMES)
    return min(taken)


if __name__ == "__main__":
    main()
