"""Where the time of a training step goes: operations of one step, sorted, and the parts of the loop around it.

    python -m benchmarks.profile_step --data rows.jsonl

Runs in the environment of the project, from its root.
"""

import argparse
from collections import defaultdict

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks.device import activities, seconds_of, wait
from benchmarks.setup import materials_of, trainer_of

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm", "mkldnn")
KINDS = {
    "matrix products": PRODUCTS,
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "flash_attention"),
    "copies and casts": (
        "aten::copy_",
        "aten::_to_copy",
        "aten::cat",
        "aten::clone",
        "aten::fill_",
        "aten::zero_",
    ),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm", "Optimizer"),
}


def kind_of(name: str) -> str:
    """Return which line of the summary an operation belongs to."""
    for kind, prefixes in KINDS.items():
        if any(prefix in name for prefix in prefixes):
            return kind
    return "other element-wise"


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--top", type=int, default=25)
    args = parser.parse_args()
    materials, said = materials_of(
        model=args.model, data=args.data, batch_size=args.batch_size, max_tokens=args.max_length
    )
    with trainer_of(materials, said) as (trainer, _):
        print("\n".join(said))
        for _ in range(2):
            trainer.take_step()
        first = trainer.state.step
        done = []
        plain = seconds_of(lambda: done.extend(trainer.take_step() for _ in range(args.steps))) / args.steps
        tokens = sum(step.tokens for step in done)
        print(
            f"{args.steps} steps on {trainer.device}: {plain:.3f} s each, {tokens / plain / args.steps:.0f} tokens/s"
        )
        trainer.state = type(trainer.state)(step=first)
        with profile(activities=activities(), record_shapes=True) as recorded:
            for _ in range(args.steps):
                trainer.take_step()
            wait()
    kinds: dict[str, float] = defaultdict(float)
    events = recorded.key_averages()
    time = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    for event in events:
        if event.device_type is not DeviceType.CPU:
            continue  # a kernel, whose time its operation has too
        kinds[kind_of(event.key)] += getattr(event, time) / 1e6 / args.steps
    for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{kind:22} {seconds:7.3f} s {seconds / sum(kinds.values()):6.1%}")
    print(events.table(sort_by=time, row_limit=args.top, max_name_column_width=50))


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
