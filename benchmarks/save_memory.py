"""What a save of weights that are shared out, and going on from it, take of each process's memory.

    OMP_NUM_THREADS=1 python -m benchmarks.save_memory --processes 2 4

Processes share out a Llama of random weights, with AdamW's moments, and save it in the background as a training does. Memory is
anonymous memory of a process: pages of files, which the system can drop, are left out. A thread looks every few milliseconds.
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.distributed.group import Group
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.state import ForgetfulStore
from sftcli.training.trainer import Trainer
from sftcli.training.weights.sharded import ShardedWeights
from tests.support.processes import run_together
from tests.support.saving import store_of

CPU = torch.device("cpu")
_LOOK_SECONDS = 0.005
_MB = 1e6


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def highest() -> Iterator[list[int]]:
    """Yield a list to which the highest anonymous memory of the block is added at its end."""
    found, end, peak = list[int](), Event(), 0

    def look() -> None:
        nonlocal peak
        while not end.wait(_LOOK_SECONDS):
            peak = max(peak, anonymous_bytes())

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        end.set()
        thread.join()
        found.append(max(peak, anonymous_bytes()))


def trainer_of(group: Group, config: LlamaConfig) -> Trainer:
    """Return a trainer whose weights and moments are shared out in ``group``; it can save and restore, and takes no steps."""
    settings = TrainingSettings(max_steps=9, warmup_steps=0, learning_rate=1e-5, packing="off")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    weights = ShardedWeights(model, compute_dtype=torch.float32, group=group, shards=group.size, device=CPU)
    optimizer = make_optimizer(weights.masters, settings)
    for master in weights.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Trainer(
        settings=settings,
        checkpoint=CheckpointSettings(),
        weights=weights,
        optimizer=optimizer,
        batch_loss=lambda batch: batch.input_ids.sum(),
        ladder=SimpleNamespace(plan=lambda state: None),
        heldout_loss=None,
        store=ForgetfulStore(),
        emit=lambda event: None,
        device=CPU,
        group=group,
    )


def measure(group: Group, config: LlamaConfig, folder: str) -> None:
    """Save, go on from what was saved, and print what each took in every process."""
    trainer = trainer_of(group, config)
    trainer.store = store_of(trainer, Path(folder, "run"), Path(folder, "notes"))
    gc.collect()
    before = anonymous_bytes()
    begin = time.monotonic()
    with highest() as saved:
        trainer._save_and_go_on()
        trainer._saver.finish(wait=True)
    seconds = time.monotonic() - begin
    gc.collect()
    held = anonymous_bytes()
    group.sum([0.0])
    with highest() as resumed:
        trainer.restore(read_snapshot(list_checkpoints(Path(folder, "run"))[-1], is_verified=True))
    numbers = group.collect(torch.tensor([before, saved[0], held, resumed[0]], dtype=torch.float64) / _MB)
    if group.is_writer:
        for rank, (start, peak, rest, again) in enumerate(one.tolist() for one in numbers):
            print(
                f"| {group.size} | {rank} | {start:.0f} | {peak - start:.0f} | {again - rest:.0f} | {seconds:.0f} |",
                flush=True,
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32768)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=options.vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        count = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    sys.stdout.write(f"{count / 1e6:.0f} M weights, 4 bytes each are {4 * count / _MB:.0f} MB\n")
    sys.stdout.write(
        "| processes | rank | MB before | a save adds MB | going on adds MB | seconds of the save |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    sys.stdout.flush()
    for size in options.processes:
        folder = Path(tempfile.mkdtemp(prefix="save-memory-"))
        try:
            run_together(measure, size=size, folder=folder / "meeting", args=(config, str(folder)))
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
