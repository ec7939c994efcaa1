"""What saving in the background costs the steps that are taken meanwhile.

    OMP_NUM_THREADS=2 python -m benchmarks.checkpoint

A Llama of random weights, of the default model's shape unless the options say otherwise, takes steps without a save, then
steps of which some run beside one, then steps without again. Saves are real ones: staged, hashed, synced, read back.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.events import CheckpointSaved, Event, NeverStop, StepDone
from sftcli.figures import gigabytes
from sftcli.runtime import choose_device, choose_dtype
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from tests.support.recording import MemoryStore
from tests.support.training import build_trainer, random_examples


@dataclass
class Watch:
    """Remembers when each event came."""

    seen: list[tuple[float, Event]] = field(default_factory=list)

    def __call__(self, event: Event, /) -> None:
        self.seen.append((time.monotonic(), event))

    def steps(self) -> list[tuple[float, float]]:
        """Return begin and end of each step."""
        return [(at - event.seconds, at) for at, event in self.seen if isinstance(event, StepDone)]

    def saves(self) -> Iterator[tuple[float, float]]:
        """Yield begin and end of each save."""
        for at, event in self.seen:
            if isinstance(event, CheckpointSaved):
                yield at - event.seconds, at


class Forgetful(MemoryStore):
    """A store that keeps nothing."""

    def save(self, snapshot: object, /) -> str:
        """Return at once."""
        return "nowhere"


def watch_steps(options: argparse.Namespace, steps: int, every: int, root: Path | None) -> Watch:
    """Take ``steps`` steps, with a save after every so many of them where there is a ``root``."""
    watch = Watch()
    checkpoint = CheckpointSettings(every_steps=every, every_minutes=0, keep_last=1, keep_best=False)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    store = Forgetful() if root is None else DirectoryCheckpointStore(
        root, settings=checkpoint, write_model_files=lambda folder: None, fingerprints={}
    )  # fmt: skip
    torch.manual_seed(0)
    settings = TrainingSettings(
        max_steps=steps, warmup_steps=0, batch_size=options.rows, micro_batch_size=options.rows
    )
    build_trainer(
        settings=settings, store=store, emit=watch, model=LlamaForCausalLM(config), checkpoint=checkpoint,
        examples=random_examples(64, longest=options.tokens), dtype=choose_dtype("auto", choose_device()),
    ).fit(NeverStop())  # fmt: skip
    return watch


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="longest row")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        quiet = watch_steps(options, options.steps // 2, 0, None)
        busy = watch_steps(options, options.steps, options.steps // 2, Path(folder))
        again = watch_steps(options, options.steps // 2, 0, None)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    saves = list(busy.saves())[:1]  # the last save waits until it is durable
    # Steps of the same number have the same rows; the first one makes the optimizer's state.
    alone = {
        n: min(a[1] - a[0], b[1] - b[0])
        for n, (a, b) in enumerate(zip(quiet.steps(), again.steps(), strict=True))
    }
    beside = {
        n: end - begin
        for n, (begin, end) in enumerate(busy.steps())
        if any(begin < done and end > started for started, done in saves)
    }
    bare = median(seconds for n, seconds in alone.items() if n)
    pauses = [later[0] - earlier[1] for earlier, later in pairwise(busy.steps())]
    slowed = median(beside.values())
    sys.stdout.write(
        f"checkpoint of {gigabytes(size)}, {torch.get_num_threads()} threads\n"
        f"step without a save     {bare:.3f} s (median of {len(alone) - 1})\n"
        f"step beside a save      {slowed:.3f} s (median of {len(beside)}), ratio {slowed / bare:.3f}\n"
        f"pause to copy the state {max(pauses):.3f} s, once a save\n"
        f"save in the background  {saves[0][1] - saves[0][0]:.1f} s\n"
    )


if __name__ == "__main__":
    main()
