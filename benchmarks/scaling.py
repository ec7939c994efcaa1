"""Predicts memory, traffic and time of a step from a small model, and checks the model against processes on this CPU.

python -m benchmarks.scaling                # predictions for GPUs, from data sheets
python -m benchmarks.scaling --model 70B    # one of the models on 8 and 64 GPUs, line by line
python -m benchmarks.scaling --check        # 1, 2 and 4 processes here, measured against predicted
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from sftcli.training.distributed.traffic import Traffic, Weight, replicated_traffic, sharded_traffic
from sftcli.training.loss import CHUNK_LOGITS


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder with grouped keys and gated feed-forward; tied or not."""

    name: str
    layers: int
    width: int
    inner: int
    keys: int  # width of keys and of values
    vocab: int
    tied: bool

    @property
    def layer(self) -> list[Weight]:
        w, f, k = self.width, self.inner, self.keys
        shapes = [(w, w), (k, w), (k, w), (w, w), (f, w), (f, w), (w, f), (w,), (w,)]
        return [Weight(shape=shape) for shape in shapes]

    @property
    def root(self) -> list[Weight]:
        table = Weight(shape=(self.vocab, self.width))
        return [table, *([] if self.tied else [table]), Weight(shape=(self.width,))]

    @property
    def numbers(self) -> int:
        return sum(w.padded(1) for w in self.layer) * self.layers + sum(w.padded(1) for w in self.root)

    def traffic(
        self,
        processes: int,
        shards: int,
        micro_batches: int,
        compute_bytes: int,
        *,
        each_micro_batch: bool,
    ) -> Traffic:
        if processes == 1:
            return Traffic()
        if shards == 1:
            return replicated_traffic([*self.layer * self.layers, *self.root])
        return sharded_traffic(
            [self.layer] * self.layers,
            self.root,
            shards=shards,
            copies=processes // shards,
            micro_batches=micro_batches,
            compute_bytes=compute_bytes,
            exchanges=micro_batches if each_micro_batch else 1,
        )


MODELS = (
    Shape(name="SmolLM2-135M", layers=30, width=576, inner=1536, keys=192, vocab=49152, tied=True),
    Shape(name="8B (Llama 3.1)", layers=32, width=4096, inner=14336, keys=1024, vocab=128256, tied=False),
    Shape(name="70B (Llama 3.1)", layers=80, width=8192, inner=28672, keys=1024, vocab=128256, tied=False),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """H100 SXM and InfiniBand, by data sheet, and two assumptions: half of the peak, 20 us for a hop."""

    memory: float = 80e9
    flops: float = 0.5 * 989e12  # bfloat16, dense
    inside: float = 450e9  # bytes/s out of a GPU to others of its machine (NVLink 4)
    between: float = 50e9  # bytes/s out of a GPU to other machines (400 Gbit/s each)
    latency: float = 20e-6
    per_machine: int = 8

    def bandwidth(self, processes: int) -> float:
        return self.inside if processes <= self.per_machine else self.between


def head_bytes(shape: Shape, tokens: int) -> float:
    """Logits of a chunk in bfloat16 and in float32, in whose place their gradient is made: ``loss.CHUNK_LOGITS``."""
    return 6 * min(CHUNK_LOGITS["cuda"], tokens * shape.vocab)


def memory_bytes(
    shape: Shape, shards: int, micro_batches: int, tokens: int, *, each_micro_batch: bool
) -> float:
    """Weights, gradients, moments and, with gradient checkpointing, activations of ``tokens`` in a pass."""
    numbers, one = shape.numbers, sum(w.padded(1) for w in shape.layer)
    inputs = 2 * shape.layers * tokens * shape.width
    layer = 34 * tokens * shape.width  # inside one layer, without the scores (Korthikanti et al. 2022, eq. 2)
    activations = inputs + layer + head_bytes(shape, tokens)
    if shards == 1:
        return (2 + 4 + 4 + 8) * numbers + activations
    root = sum(w.padded(1) for w in shape.root)
    gradients = 4 * numbers if micro_batches > 1 and not each_micro_batch else 4 * numbers / shards
    return (4 + 8) * numbers / shards + gradients + 2 * (2 * one + root) + activations


def step_seconds(
    shape: Shape,
    processes: int,
    shards: int,
    micro_batches: int,
    tokens: int,
    *,
    each_micro_batch: bool,
    machine: Machine,
) -> tuple[float, float]:
    """Compute, and exchange, of a step; 8 N for a token, as gradient checkpointing computes forward twice."""
    compute = micro_batches * tokens * 8 * shape.numbers / machine.flops
    if processes == 1:
        return compute, 0.0
    traffic, copies = (
        shape.traffic(processes, shards, micro_batches, 2, each_micro_batch=each_micro_batch),
        processes // shards,
    )
    exchange = traffic.shard_wire_bytes(shards) / machine.bandwidth(shards)
    exchange += traffic.copy_wire_bytes(copies) / machine.bandwidth(processes)
    if shards > 1:
        exchange += micro_batches * 3 * shape.layers * machine.latency * shards.bit_length()
    if copies > 1:
        calls = shape.numbers / 2**24 if shards == 1 else shape.layers
        exchange += calls * machine.latency * copies.bit_length()
    return compute, exchange


def predict(rows: int, tokens: int) -> None:
    machine = Machine()
    print(f"{rows} rows of {tokens} tokens a step, one row a pass; H100 80 GB, predicted, nothing measured\n")
    print(
        "| model | GPUs | mode | GB a GPU | fits | GB exchanged | compute s | exchange s | tokens/s a GPU |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in MODELS:
        for processes in (1, 8, 64, 1024):
            for mode, shards in _modes(machine, processes):
                micro_batches = -(-rows // processes)
                size = partial(memory_bytes, shape, shards, micro_batches, tokens)
                each = shards > 1 and size(each_micro_batch=False) > machine.memory
                memory = size(each_micro_batch=each)
                compute, exchange = step_seconds(
                    shape, processes, shards, micro_batches, tokens, each_micro_batch=each, machine=machine
                )
                traffic = shape.traffic(processes, shards, micro_batches, 2, each_micro_batch=each)
                bytes_ = traffic.shard_wire_bytes(shards) + traffic.copy_wire_bytes(processes // shards)
                # fully_shard gathers the next layer while one computes; gradients of ddp go after the last pass.
                seconds = compute + exchange if mode == "ddp" else max(compute, exchange)
                print(
                    f"| {shape.name} | {processes} | {mode}{' each micro-batch' if each else ''} | {memory / 1e9:.1f} | "
                    f"{'yes' if memory < machine.memory else 'no'} | {bytes_ / 1e9:.1f} | {compute:.2f} | "
                    f"{exchange:.2f} | {rows * tokens / seconds / processes:.0f} |"
                )
                if mode.startswith("hsdp") and memory < machine.memory:
                    break  # larger groups need less memory and more time


def _modes(machine: Machine, processes: int) -> Iterator[tuple[str, int]]:
    """Modes, and how many processes hold a replica together; inside one machine hsdp is fsdp."""
    yield "ddp", 1
    if processes > 1:
        yield "fsdp", processes
    for machines in (1, 2, 4):
        if (shards := machines * machine.per_machine) < processes:
            yield f"hsdp by {shards}", shards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="measure steps on this machine")
    parser.add_argument("--rounds", type=int, default=15, help="of --check")
    parser.add_argument("--model", help="a part of one name, such as 70B")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    chosen = parser.parse_args()
    if chosen.check:
        from benchmarks.scaling_check import check

        check(chosen.rounds)
    elif chosen.model:
        from benchmarks.scaling_report import report

        (shape,) = (shape for shape in MODELS if chosen.model in shape.name)
        report(shape, chosen.rows, chosen.tokens)
    else:
        predict(chosen.rows, chosen.tokens)
