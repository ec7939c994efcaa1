"""How a training step grows with the length of rows, their number, the vocabulary and the data: time and memory.

    OMP_NUM_THREADS=2 python -m benchmarks.curves --out curves.jsonl --draw docs/images/curves.png

A decoder of the width of SmolLM2-135M and fewer layers, random weights and random rows. Each point has a process of its own,
as peak memory is that of a process. With ``--draw`` alone the points of ``--out`` are drawn again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import BatchPlan, Packing, collate_packed
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.runtime import choose_device, choose_dtype, peak_memory_bytes
from sftcli.training.loss import response_nll_sum, three_sums
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.optim.update import launch_update
from sftcli.training.weights.masters import MasterWeights

LAYERS = 6
STEPS = 4  # of which the first is not timed
RESPONSE = 4  # one token of so many is trained
USUAL = {"length": 256, "rows": 4, "vocabulary": 49152}
SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "length": ("tokens in a row", (256, 512, 1024, 2048, 4096)),
    "rows": ("rows in a micro-batch", (1, 2, 4, 8, 16, 32)),
    "vocabulary": ("tokens in the vocabulary", (32768, 65536, 131072, 262144)),
    "data": ("rows of data", (1_000, 10_000, 100_000, 1_000_000)),
}


class Lengths:
    """Rows of data that exist as lengths only until they are asked for."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self.num_tokens = generator.lognormal(4.5, 0.8, count).clip(8, 512).astype(np.int32)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> Example:
        return example(int(self.num_tokens[index]), 1000)


def example(length: int, vocabulary: int) -> Example:
    """Return a random row whose last quarter is trained."""
    ids = np.random.default_rng(length).integers(0, vocabulary, length).astype(np.int32)
    return Example(
        input_ids=ids,
        loss_mask=np.arange(length) >= length - max(1, length // RESPONSE),
        origin=Origin(path="random", line=1),
    )


def step_point(length: int, rows: int, vocabulary: int) -> float:
    """Return the seconds of a training step."""
    torch.manual_seed(0)
    device = choose_device()
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    weights = MasterWeights(model, compute_dtype=choose_dtype("auto", device))
    fuse_layers(model)
    attend_by_document(model)
    optimizer = make_optimizer(weights.masters, TrainingSettings(learning_rate=1e-5))
    batch = collate_packed([[example(length, vocabulary)] * rows], example_ids=range(rows), pad_id=0).to(
        device
    )
    taken = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        nll = response_nll_sum(model, batch)
        (nll / batch.response_tokens).backward()  # type: ignore[no-untyped-call]
        sums, asks_device = three_sums(nll.detach()), device.type == "cuda"
        launch_update(weights, optimizer, sums, max_norm=1.0, asks_device=asks_device)()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def data_point(count: int) -> float:
    """Return the seconds to order so many rows, and to lay out a hundred packed steps of them."""
    rows = Lengths(count)
    begin = time.perf_counter()
    plan = BatchPlan(
        rows, batch_size=32, micro_batch_size=8, pad_id=0, seed=0, packing=Packing(row_tokens=2048)
    )
    for step in range(100):
        plan.window(step * (count // 3200))
    return time.perf_counter() - begin


def measure(sweep: str, value: int) -> dict[str, object]:
    """Return one point, measured in this process."""
    seconds = data_point(value) if sweep == "data" else step_point(**(USUAL | {sweep: value}))
    peak = peak_memory_bytes(choose_device())
    return {"sweep": sweep, "value": value, "seconds": seconds, "peak_bytes": peak}


def draw(points: list[dict[str, float]], path: Path) -> None:
    """Draw time and memory over each quantity, with a line that grows as it does from the first point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(SWEEPS), figsize=(15, 6.4), layout="constrained")
    for column, (sweep, (label, _)) in enumerate(SWEEPS.items()):
        own = sorted((point for point in points if point["sweep"] == sweep), key=lambda point: point["value"])
        values = [point["value"] for point in own]
        for axes, key, unit, scale in (
            (grid[0][column], "seconds", "seconds", 1.0),
            (grid[1][column], "peak_bytes", "peak memory, GB", 1e9),
        ):
            shown = [point[key] / scale for point in own]
            axes.plot(values, shown, "o-", color="#2563eb")
            for value, number in zip(values, shown, strict=True):
                axes.annotate(
                    f"{number:.3g}",
                    (value, number),
                    textcoords="offset points",
                    xytext=(0, 7),
                    ha="center",
                    fontsize=8,
                )
            if key == "seconds" and sweep != "data":
                axes.plot(values, [shown[-1] * value / values[-1] for value in values], ":", color="#94a3b8")
            axes.set(xscale="log", xticks=values, xlabel=label, ylim=(0, max(shown) * 1.15))
            axes.set_xticks(values, [_short(value) for value in values])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            if not column:
                axes.set_ylabel(unit)
    figure.savefig(path, dpi=110)


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 10_000 else f"{value:g}"


def main() -> None:
    """Measure the points that are not there yet, and draw all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file of the points")
    parser.add_argument("--draw", type=Path, help="picture to draw")
    parser.add_argument("--point", nargs=2, metavar=("SWEEP", "VALUE"), help="one point, in this process")
    flags = parser.parse_args()
    if flags.point:
        with flags.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measure(flags.point[0], int(flags.point[1]))) + "\n")
        return
    lines = flags.out.read_text(encoding="utf-8").splitlines() if flags.out.exists() else []
    known = {(point["sweep"], point["value"]) for point in map(json.loads, lines)}
    for sweep, (_, values) in SWEEPS.items():
        for value in values:
            if (sweep, value) not in known:
                command = ["-m", "benchmarks.curves", "--out", str(flags.out), "--point", sweep, str(value)]
                subprocess.run([sys.executable, *command], check=True)
    points = [json.loads(line) for line in flags.out.read_text(encoding="utf-8").splitlines()]
    for point in points:
        print(
            f"{point['sweep']:>12}{point['value']:>9}{point['seconds']:>9.3f} s{point['peak_bytes'] / 1e9:>7.2f} GB"
        )
    if flags.draw:
        draw(points, flags.draw)


if __name__ == "__main__":
    main()
