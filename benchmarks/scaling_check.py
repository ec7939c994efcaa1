"""Compares the cost model of ``scaling.py`` with steps of 1, 2 and 4 processes on this machine.

Terms and steps are measured in turn, many times, so that what else the machine does weighs on both alike. Each process computes while
all others do: processes that share cores and memory slow each other down, and so do they in a step. A time is that of the slowest process.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.scaling import Shape
from sftcli.config.schema.training import TrainingSettings
from sftcli.training.distributed.group import Group

SMALL = Shape(name="small", layers=4, width=256, inner=768, keys=256, vocab=8192, tied=True)
PROCESSES = (1, 2, 4)
ROWS, LENGTH = 4, 128


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a round has measured: seconds of a pass, an update and an empty exchange, and bytes/s of each kind of exchange and of copies."""

    one_pass: float
    update: float
    latency: float
    rates: dict[str, float]  # as ``Traffic`` counts them
    copies: float  # within the memory of a process

    def predict(self, mode: str, size: int) -> tuple[float, float]:
        """Return the seconds of a step, and of them those of exchanges and copies."""
        shards, micro_batches = (1 if mode == "ddp" else size), ROWS // size
        compute = micro_batches * self.one_pass + self.update / shards
        if size == 1:
            return compute, 0.0
        traffic = SMALL.traffic(size, shards, micro_batches, 4, each_micro_batch=False)
        groups = SMALL.layers + 1
        calls = 2 if mode == "ddp" else micro_batches * (groups + SMALL.layers) + groups + 1
        # What is exchanged is laid end to end in a buffer before, and taken out of one after: of a gather a part and the whole.
        copied = (traffic.gathered + traffic.scattered) * (1 + 1 / size) + 2 * traffic.summed
        exchange = sum(getattr(traffic, kind) / rate for kind, rate in self.rates.items())
        exchange += calls * self.latency + copied / self.copies
        return compute + exchange, exchange


class Stepper:
    """Takes steps of the small model on its rows, as a training of ``group`` does."""

    def __init__(self, group: Group, mode: str) -> None:
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
        self.group, self.window = group, _window()
        self.weights: MasterWeights = (
            ShardedWeights(
                model, compute_dtype=torch.float32, group=group, shards=group.size, device=torch.device("cpu")
            )
            if mode == "fsdp"
            else MasterWeights(model, compute_dtype=torch.float32)
        )
        settings = TrainingSettings(max_steps=99, batch_size=ROWS, micro_batch_size=1, learning_rate=1e-5)
        self.optimizer = make_optimizer(self.weights.masters, settings)
        self.batch_loss = self.weights.gathered(lambda batch: response_nll_sum(model, batch))

    def passes(self, rows: int) -> None:
        """Compute the gradients of the first ``rows`` rows, and exchange them."""
        total = torch.zeros(())
        for batch, weight in self.weights.micro_batches(self.window[:rows], self.group):
            nll = self.batch_loss(batch) * weight
            nll.backward()
            total += nll.detach()
        self.weights.gather(total, self.group)

    def update(self) -> None:
        """Update the weights."""
        self.optimizer.step()
        self.weights.publish()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Take a step."""
        self.passes(ROWS)
        self.update()


def _window():
    from sftcli.data.batches.batch import collate
    from sftcli.data.example import Example
    from sftcli.data.reading.record import Origin

    ids = torch.arange(3, 3 + LENGTH, dtype=torch.int32).numpy()
    example = Example(input_ids=ids, loss_mask=ids > LENGTH // 2, origin=Origin(path="made", line=1))
    return [collate([example], example_ids=[0], pad_id=2) for _ in range(ROWS)]


def _seconds(call: Callable[[], object]) -> float:
    """Return what ``call`` takes in the slowest process; all begin together."""
    dist.barrier()
    begin = time.monotonic()
    call()
    spent = torch.tensor(time.monotonic() - begin, dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def _measure_terms(alone: Stepper, size: int) -> Terms:
    """Measure the terms, in tensors of the sizes that travel: a layer, and all gradients."""
    numbers = sum(weight.padded(size) for weight in SMALL.layer)
    layer, part = torch.zeros(numbers), torch.zeros(numbers // size)
    whole, one = torch.zeros(SMALL.numbers), torch.zeros(1)
    micro_batches = ROWS // size
    one_pass = _seconds(lambda: alone.passes(micro_batches)) / micro_batches
    update = _seconds(alone.update)
    latency = _seconds(lambda: dist.all_reduce(one))
    target = torch.empty_like(whole)  # larger than caches, which others fill between two copies of a step
    copies = whole.nbytes / _seconds(lambda: target.copy_(whole))

    # Older versions of torch have other names.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def rate(tensor: Tensor, call: Callable[[], object]) -> float:
        return tensor.nbytes / max(1e-6, _seconds(call) - latency)

    rates = {
        "summed": rate(whole, lambda: dist.all_reduce(whole)),
        "gathered": rate(layer, lambda: gather(layer, part)),
        "scattered": rate(layer, lambda: scatter(part, layer)),
    }
    return Terms(one_pass=one_pass, update=update, latency=latency, rates=rates, copies=copies)


def _of_several(rank: int, size: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    alone = Stepper(Group(), "ddp")
    steppers = {
        mode: Stepper(Group(rank=rank, size=size), mode)
        for mode in (("ddp", "fsdp") if size > 1 else ("ddp",))
    }
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in steppers}
    for number in range(rounds + 2):
        terms = _measure_terms(alone, size)
        for mode, stepper in steppers.items():
            measured = _seconds(stepper.step)
            if number >= 2:  # the first ones fill caches
                found[mode].append((measured, *terms.predict(mode, size)))
    dist.destroy_process_group()
    for mode, values in found.items():
        if rank == 0:
            _show(size, mode, values)


def _show(size: int, mode: str, values: list[tuple[float, float, float]]) -> None:
    measured, predicted, exchange = (statistics.median(column) for column in zip(*values, strict=True))
    ratios = statistics.quantiles([one[1] / one[0] - 1 for one in values], n=4)
    print(
        f"| {size} | {mode if size > 1 else '-'} | {1e3 * measured:.0f} | {1e3 * predicted:.0f} | {1e3 * exchange:.0f} | "
        f"{predicted / measured - 1:+.0%} | {ratios[0]:+.0%} to {ratios[2]:+.0%} |",
        flush=True,
    )


def check(rounds: int) -> None:
    """Print the comparison."""
    print(
        f"{SMALL.numbers / 1e6:.1f} M weights in float32, {ROWS} micro-batches of {LENGTH} tokens a step; medians of {rounds} rounds\n"
    )
    print(
        "| processes | mode | measured ms | predicted ms | of it exchange ms | error | half of the rounds |\n|---|---|---|---|---|---|---|"
    )
    for size in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_of_several, args=(size, folder, rounds), nprocs=size)
