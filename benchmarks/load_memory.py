"""How much memory each process of a training needs until the weights are shared out.

    OMP_NUM_THREADS=1 python -m benchmarks.load_memory --processes 2 4

A model of random weights in bfloat16 is written in several files, 1.5B of them unless the options say otherwise. Processes load it,
try on it what a training tries, and share it out: each by itself from the whole model (``whole``), or reading its part
(``parts``). Peaks are of anonymous memory, sampled: pages of mapped files, which the system takes back at need, are left out.
What the libraries take before is subtracted.
"""

import argparse
import re
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from sftcli.modeling.architecture import require_causal
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.load import load_in_parts, load_model
from sftcli.runtime import keep_freed_memory, stop_keeping_memory
from sftcli.services.train.loading import streamed
from sftcli.training.distributed.group import Group
from sftcli.training.probes.agreement import WORK, Ways, agreed_ways
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.rows import cut_rows
from sftcli.training.weights.placement import local_part
from sftcli.training.weights.sharded import ShardedWeights
from tests.support.training import random_examples

_EVERY = 0.005  # seconds between samples
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


class Peak:
    """The most anonymous memory that this process has inside the block, beyond what it had before."""

    def __enter__(self) -> "Peak":
        self.before = self.most = _anonymous()
        self._is_over = Event()
        self._sampler = Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._is_over.wait(_EVERY):
            self.most = max(self.most, _anonymous())

    @property
    def bytes(self) -> int:
        """What it is."""
        return self.most - self.before


@dataclass(frozen=True)
class Found:
    """What a process measured."""

    loading: int  # bytes at the most until the model is there
    trying: int  # while it is tried
    sharing: int  # while its weights are shared out
    kept: int  # of the shard
    seconds: float

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.loading, self.trying, self.sharing)


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write the model; a process of its own does it, whose memory is then gone."""
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.middle,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size=options.file_size)


def measure(rank: int, size: int, way: str, folder: Path, store: Path) -> Found:
    """Load the model, try it and share it out as process ``rank`` of ``size`` does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group, device = Group(rank=rank, size=size), torch.device("cpu")
    rows = random_examples(20)
    (stop_keeping_memory if way == "parts" else keep_freed_memory)(
        device
    )  # as a training does, then and before
    begun = time.monotonic()
    with Peak() as whole:
        if way == "parts":
            model, files = load_in_parts(folder, dtype=torch.float32, together=group)
        else:
            model, files = load_model(folder, dtype=torch.float32, device=device), None
        loading, whole.most = whole.bytes, 0
        with streamed(model, files) as hold:
            fusion = fuse_layers(model, hold=hold)
            require_causal(model)
            agreed_ways(
                model,
                fusion,
                cut_rows(model, rows, work=WORK, count=2),
                wanted=Ways(layers=True, rows=RowSharing.BOUNDS, head=True),
                pad_id=0,
                with_gradients=False,
            )
        trying, whole.most = whole.bytes, 0
        weights = ShardedWeights(
            model, compute_dtype=torch.bfloat16, group=group, shards=size, device=device, files=files
        )
        time.sleep(2 * _EVERY)
    kept = sum(local_part(master).nbytes for master in weights.masters.values())
    seconds = time.monotonic() - begun
    group.sum([0.0])
    dist.destroy_process_group()
    return Found(loading=loading, trying=trying, sharing=whole.bytes, kept=kept, seconds=seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--ways", nargs="+", choices=["whole", "parts"], default=["whole", "parts"])
    parser.add_argument("--model", type=Path, help="a folder to load instead")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--middle", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--file-size", default="1GB")
    parser.add_argument("--root", type=Path, help="where the model is written, and deleted afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.root) as name:
        folder, spawn = options.model or Path(name) / "model", get_context("spawn")
        if options.model is None:
            with spawn.Pool(1) as pool:
                pool.apply(write_model, (folder, options))
        print("| processes | way | loading GB | trying GB | sharing out GB | peak GB | shard GB | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for size in options.processes:
            for way in options.ways:
                store = Path(name) / f"store-{size}-{way}"
                tasks = [(rank, size, way, folder, store) for rank in range(size)]
                with spawn.Pool(size) as pool:
                    found = max(pool.starmap(measure, tasks, chunksize=1), key=lambda one: one.peak)
                parts = (found.loading, found.trying, found.sharing, found.peak, found.kept)
                print(f"| {size} | {way} | {' | '.join(map(_gb, parts))} | {found.seconds:.0f} |", flush=True)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _anonymous() -> int:
    found = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert found is not None  # Linux says it
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
