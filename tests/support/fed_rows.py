"""What a training really feeds its model: the rows, read back from the ids at the embedding, of each micro-batch that counts."""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from sftcli.services.train.run import TrainingRun
from sftcli.training.trainer import Trainer
from tests.support.several import train_here

ROW = re.compile(r"Say a (\d+) times")  # what tells the rows of ``several.write_rows`` apart


def record_fed(folder: Path) -> None:
    """Make trainers that are built from now on in this process write each micro-batch to ``folder``, a file for each process."""

    class RecordingTrainer(Trainer):
        def __init__(self, **parts):
            super().__init__(**parts)
            fed: list[list[int]] = []
            micro_batches = self.weights.micro_batches

            def recorded(batches, group):
                with (folder / f"{group.rank}.jsonl").open("a", encoding="utf-8") as file:
                    for batch, weight in micro_batches(batches, group):
                        fed.clear()
                        yield batch, weight
                        row = {"step": self.state.step + 1, "weight": weight, "rows": fed}
                        file.write(json.dumps(row) + "\n")

            def see(_module, inputs):
                if torch.is_grad_enabled():
                    fed.extend(inputs[0].tolist())

            self.weights.micro_batches = recorded
            self.weights.model.get_input_embeddings().register_forward_pre_hook(see)

    TrainingRun.trainer_type = RecordingTrainer


def train_and_record(place: Path, run: str, *changes: str) -> None:
    """Train ``run`` on the model in ``place`` in this process, and record what it is fed in ``fed-RUN``."""
    (place / f"fed-{run}").mkdir(exist_ok=True)
    record_fed(place / f"fed-{run}")
    train_here(place, place / "model", run, *changes)


def rows_of_steps(folder: Path, model: Path) -> list[list[int]]:
    """Return the numbers of the rows of each step that all processes fed together, in order of number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    steps: dict[int, list[int]] = defaultdict(list)
    for path in folder.glob("*.jsonl"):
        for told in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            texts = tokenizer.batch_decode(told["rows"])
            assert texts
            if told["weight"]:
                steps[told["step"]] += [int(found) for text in texts for found in ROW.findall(text)]
    assert sorted(steps) == list(range(1, len(steps) + 1))
    return [sorted(steps[step]) for step in sorted(steps)]
