"""One setting of ``[training]`` at a time, beside the defaults: tokens per second and peak memory.

    python -m benchmarks.switches --data rows.jsonl [--steps 8] [--rounds 2]

Each measurement is one of ``benchmarks/train.py`` in a process of its own. The settings take turns, and the best of their
rounds counts, so that what else the machine does for a while falls on none of them alone.
"""

import argparse
import json
import subprocess
import sys

SWITCHES: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "rows padded, not packed": ("packing=off",),
    "float32 products": ("precision=fp32",),
    "bfloat16 products": ("precision=bf16",),
    "gradient checkpointing": ("gradient_checkpointing=true",),
    "one row a pass": ("packing=off", "micro_batch_size=1"),
    "embeddings frozen": ("train_embeddings=false",),
    "Adafactor": ("optimizer=adafactor",),
    "AdamW in 8 bits": ("optimizer=adamw_8bit",),
}


def measure(arguments: argparse.Namespace, settings: tuple[str, ...]) -> dict[str, float]:
    """Return what ``benchmarks/train.py`` prints."""
    command = [sys.executable, "-m", "benchmarks.train", "--only", "sft", "--data", arguments.data]
    command += ["--model", arguments.model, "--steps", str(arguments.steps)]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="rows")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SWITCHES}
    for _ in range(arguments.rounds):
        for name, settings in SWITCHES.items():
            found[name].append(measure(arguments, settings))
            print(f"{name}: {found[name][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    speeds = {name: max(one["tokens_per_second"] for one in results) for name, results in found.items()}
    print("| switch | tokens/s | of the defaults | peak memory |\n|---|--:|--:|--:|")
    for name, results in found.items():
        memory = min(one["peak_memory_bytes"] for one in results) / 1e9
        print(f"| {name} | {speeds[name]:.0f} | {speeds[name] / speeds['defaults']:.2f} | {memory:.2f} GB |")


if __name__ == "__main__":
    main()
