"""Measures how much of a slow exchange hides behind the passes: processes on this CPU, and a link that is as slow as one likes.

python benchmarks/overlap.py                    # ddp and fsdp on 2 processes
python benchmarks/overlap.py --processes 4      # and hsdp on 2 x 2

Collectives take their own time and then what the link takes for their bytes, one after the other; waiting for it uses no core.
Nor do the layers, which sleep for as long as they would compute, backward twice as long as forward: what else the machine does moves little.
Before: gradients are exchanged behind the last pass, and layers are gathered when they are needed. After: as it is.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.data.batches.batch import Batch, collate
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.training.distributed import gradient_exchange
from sftcli.training.distributed.group import Group
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights import rejoining
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.weights.sharded import ShardedWeights, layers_of

CPU = torch.device("cpu")
MICRO_BATCHES, LENGTH, STEPS = 2, 16, 9  # of each process
LAYER_SECONDS = 0.01  # of a layer's forward pass


class Sent(dist.Work):
    """A collective whose bytes arrive at a certain time."""

    def __init__(self, work: dist.Work, arrives: float) -> None:
        super().__init__()
        self._work, self._arrives = work, arrives

    def wait(self, *_: object) -> bool:
        self._work.wait()
        time.sleep(max(0.0, self._arrives - time.monotonic()))
        return True


@dataclass
class Link:
    """What all bytes of a process go through, in turn."""

    rate: float  # bytes/s
    latency: float = 200e-6
    free_at: float = 0.0
    busy: float = 0.0

    def slows(self, call: Callable, place: int, factor: float) -> Callable:
        """Return the collective ``call`` over this link; of its argument ``place`` goes ``factor`` (N - 1) / N."""

        def collective(*args: object, async_op: bool = False, **more: object) -> dist.Work | None:
            tensor = args[place] if args else [*more.values()][place]
            processes = dist.get_world_size(more.get("group"))
            seconds = self.latency + factor * (processes - 1) / processes * tensor.nbytes / self.rate
            self.free_at = max(time.monotonic(), self.free_at) + seconds
            self.busy += seconds
            sent = Sent(call(*args, async_op=True, **more), self.free_at)
            return sent if async_op else (sent.wait() and None)

        return collective

    def install(self) -> None:
        dist.all_reduce = self.slows(dist.all_reduce, 0, 2)
        rejoining._GATHER = self.slows(rejoining._GATHER, 0, 1)
        rejoining._SCATTER = self.slows(rejoining._SCATTER, 1, 1)


def _compute(_: torch.nn.Module, __: object, hidden: torch.Tensor) -> None:
    """Take as long as a layer, and have its backward pass do so."""

    def compute_back(_: torch.Tensor) -> None:
        time.sleep(2 * LAYER_SECONDS)

    time.sleep(LAYER_SECONDS)
    hidden.register_hook(compute_back)


def _weights(group: Group, shards: int, *, overlaps: bool) -> MasterWeights:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=1024, tie_word_embeddings=False,
        )
    )  # fmt: skip
    for layer in layers_of(model):
        layer.register_forward_hook(_compute)
    if shards == 1:
        # Those that do not collect at once exchange behind the passes.
        return MasterWeights(model, compute_dtype=torch.float32, collects_at_once=overlaps)
    weights = ShardedWeights(model, compute_dtype=torch.float32, group=group, shards=shards, device=CPU)
    if not overlaps:
        model._set_unshard_async_op(False)
        for layer in layers_of(model):
            assert isinstance(layer, FSDPModule)
            layer.set_modules_to_forward_prefetch([])
            layer.set_modules_to_backward_prefetch([])
    return weights


def _window(group: Group) -> list[Batch]:
    ids = torch.arange(3, 3 + LENGTH, dtype=torch.int32).numpy()
    example = Example(input_ids=ids, loss_mask=ids > LENGTH // 2, origin=Origin(path="made", line=1))
    return [collate([example], example_ids=[0], pad_id=2) for _ in range(MICRO_BATCHES * group.size)]


class Stepper:
    """Steps without their update, of one way to exchange."""

    def __init__(self, group: Group, link: Link, shards: int, *, overlaps: bool) -> None:
        self._group, self._link = group, link
        self._weights = _weights(group, shards, overlaps=overlaps)
        model = self._weights.model
        self._batch_loss = self._weights.gathered(lambda batch: response_nll_sum(model, batch))
        self.seconds: list[float] = []
        self.busy = 0.0  # seconds of the link in a step
        self.loss = 0.0

    def step(self) -> None:
        self._group.any(False)  # begin together
        begin, busy = time.monotonic(), self._link.busy
        total = torch.zeros(1)
        for batch, weight in self._weights.micro_batches(_window(self._group), self._group):
            nll = self._batch_loss(batch) * weight
            nll.backward()
            self._weights.collect()
            total += nll.detach()
        self.loss = float(self._weights.gather(total, self._group))
        self.seconds.append(time.monotonic() - begin)
        self.busy = self._link.busy - busy
        self._weights.model.zero_grad(set_to_none=True)
        self._weights.publish()


def _measure(rank: int, processes: int, rate: float, folder: str) -> None:
    torch.set_num_threads(1)
    gradient_exchange.BUCKET_NUMBERS = 2**15  # as many for this model as there would be for a large one
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    group, link = Group(rank=rank, size=processes), Link(rate=rate)
    link.install()
    modes = {"ddp": 1, "fsdp": processes}
    if processes == 4:
        modes["hsdp"] = 2
    if not rank:
        print(
            f"{processes} processes, {MICRO_BATCHES} micro-batches each, layers of {1e3 * LAYER_SECONDS:.0f} ms, a link of {rate / 1e6:.0f} MB/s"
        )
        print(
            "| mode | of the link ms | step before ms | step after ms | hidden of the link |\n|---|---|---|---|---|"
        )
    for mode, shards in modes.items():
        before, after = (Stepper(group, link, shards, overlaps=overlaps) for overlaps in (False, True))
        for _ in range(STEPS + 1):  # in turn: what else the machine does slows both
            before.step()
            after.step()
        assert abs(before.loss - after.loss) < 1e-2, (before.loss, after.loss)
        slow, fast = (min(one.seconds[1:]) for one in (before, after))
        if not rank:
            print(
                f"| {mode} | {1e3 * after.busy:.0f} | {1e3 * slow:.0f} | {1e3 * fast:.0f} | {(slow - fast) / after.busy:.0%} |"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rate", type=float, default=11e6, help="bytes/s of the link of a process")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        arguments = (chosen.processes, chosen.rate, str(Path(place)))
        spawn(_measure, args=arguments, nprocs=chosen.processes)
