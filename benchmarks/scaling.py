"""Predicts memory, traffic and time of a step from a small model, and checks the model against processes on this CPU.

python benchmarks/scaling.py                # predictions for GPUs, from data sheets
python benchmarks/scaling.py --check        # 1 and 2 processes here, measured against predicted
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sftcli.config.schema.training import TrainingSettings
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.traffic import Traffic, Weight, replicated_traffic, sharded_traffic


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


def memory_bytes(
    shape: Shape, shards: int, micro_batches: int, tokens: int, *, each_micro_batch: bool
) -> float:
    """Weights, gradients, moments and, with gradient checkpointing, activations of ``tokens`` in a pass."""
    numbers, one = shape.numbers, sum(w.padded(1) for w in shape.layer)
    inputs = 2 * shape.layers * tokens * shape.width
    layer = 34 * tokens * shape.width  # inside one layer, without the scores (Korthikanti et al. 2022, eq. 2)
    activations = inputs + layer + 3 * 4 * 2**25  # and the head in chunks: loss.chunk_logits
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


SMALL = Shape(name="small", layers=4, width=256, inner=768, keys=256, vocab=8192, tied=True)
ROWS, LENGTH, STEPS = 4, 64, 5


def _trainer(group: Group, mode: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftcli.training.loss import response_nll_sum
    from sftcli.training.optim.optimizer import make_optimizer
    from sftcli.training.weights.masters import MasterWeights
    from sftcli.training.weights.sharded import ShardedWeights

    config = LlamaConfig(
        hidden_size=SMALL.width, intermediate_size=SMALL.inner, num_hidden_layers=SMALL.layers,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=SMALL.vocab, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if mode == "fsdp" and group.size > 1:
        weights = ShardedWeights(
            model, compute_dtype=torch.float32, group=group, shards=group.size, device=torch.device("cpu")
        )
    else:
        weights = MasterWeights(model, compute_dtype=torch.float32)
    settings = TrainingSettings(max_steps=99, batch_size=ROWS, micro_batch_size=1, learning_rate=1e-5)
    optimizer = make_optimizer(weights.masters, settings)
    return weights, optimizer, weights.gathered(lambda batch: response_nll_sum(model, batch))


def _window():
    from sftcli.data.batches.batch import collate
    from sftcli.data.example import Example
    from sftcli.data.reading.record import Origin

    ids = torch.arange(3, 3 + LENGTH, dtype=torch.int32).numpy()
    example = Example(input_ids=ids, loss_mask=ids > LENGTH // 2, origin=Origin(path="made", line=1))
    return [collate([example], example_ids=[0], pad_id=2) for _ in range(ROWS)]


def _timed_step(group: Group, mode: str) -> tuple[float, float]:
    """Median seconds of the micro_batches with their exchanges, and of the update."""
    weights, optimizer, batch_loss = _trainer(group, mode)
    micro_batches, updates = [], []
    for _ in range(STEPS + 1):
        begin = time.monotonic()
        total = torch.zeros(())
        for batch, weight in weights.micro_batches(_window(), group):
            nll = batch_loss(batch) * weight
            nll.backward()
            total += nll.detach()
        weights.gather(total, group)
        middle = time.monotonic()
        optimizer.step()
        weights.publish()
        optimizer.zero_grad()
        micro_batches.append(middle - begin)
        updates.append(time.monotonic() - middle)
    return statistics.median(micro_batches[1:]), statistics.median(updates[1:])


def _median_seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(8):
        begin = time.monotonic()
        call()
        found.append(time.monotonic() - begin)
    return statistics.median(found[2:])


def _terms() -> tuple[float, dict[str, float]]:
    """Latency in seconds, and bytes/s of each kind of exchange as ``Traffic`` counts them, of tensors of one layer."""
    numbers = sum(w.padded(2) for w in SMALL.layer)
    whole, part, one = torch.zeros(numbers), torch.zeros(numbers // 2), torch.zeros(1)
    latency = _median_seconds(lambda: dist.all_reduce(one))
    seconds = {
        "summed": _median_seconds(lambda: dist.all_reduce(whole)),
        "gathered": _median_seconds(lambda: dist.all_gather_into_tensor(whole, part)),
        "scattered": _median_seconds(lambda: dist.reduce_scatter_tensor(part, whole)),
    }
    return latency, {kind: whole.nbytes / max(1e-9, spent - latency) for kind, spent in seconds.items()}


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Both compute at once, as they do in a step of two: cores and memory are shared.
    alone, update = _timed_step(Group(), "ddp")
    latency, rates = _terms()
    result = {mode: sum(_timed_step(Group(rank=rank, size=2), mode)) for mode in ("ddp", "fsdp")}
    dist.destroy_process_group()
    if rank:
        return
    micro_batches = ROWS // 2
    print(f"{SMALL.numbers / 1e6:.1f} M weights, {ROWS} micro_batches a step; a pass {1e3 * alone / ROWS:.1f} ms, update "
          f"{1e3 * update:.1f} ms, exchange {1e6 * latency:.0f} us and MB/s "
          f"{ {kind: round(rate / 1e6) for kind, rate in rates.items()} }")  # fmt: skip
    print(
        "| processes | mode | measured ms | predicted ms | of it exchange ms | off |\n|---|---|---|---|---|---|"
    )
    print(f"| 1 | - | {1e3 * (alone + update):.0f} | (gives the terms) | | |")
    groups = SMALL.layers + 1
    for mode, calls in (("ddp", 2), ("fsdp", micro_batches * (groups + SMALL.layers) + groups + 1)):
        shards = 1 if mode == "ddp" else 2
        traffic = SMALL.traffic(2, shards, micro_batches, 4, each_micro_batch=False)
        exchange = sum(getattr(traffic, kind) / rate for kind, rate in rates.items()) + calls * latency
        predicted = alone / 2 + (update if mode == "ddp" else update / 2) + exchange
        off = predicted / result[mode] - 1
        print(
            f"| 2 | {mode} | {1e3 * result[mode]:.0f} | {1e3 * predicted:.0f} | {1e3 * exchange:.0f} | {off:+.0%} |"
        )


def check() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_one_of_two, args=(str(Path(folder)),), nprocs=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    chosen = parser.parse_args()
    if chosen.check:
        check()
    else:
        predict(chosen.rows, chosen.tokens)
