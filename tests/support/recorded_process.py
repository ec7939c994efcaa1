"""``sft`` in some processes, each of which writes down the rows that it feeds the model.

``python -m tests.support.recorded_process PROCESSES FOLDER train ...`` leaves ``FOLDER/RANK.jsonl``: the numbers of the rows of
every pass of a step, step by step.
"""

import json
import os
import sys
from pathlib import Path

from sftcli.cli import app
from sftcli.cli.errors_view import guarded
from sftcli.environment import set_defaults


def _record(path: Path) -> None:
    from sftcli.training.trainer import Trainer

    passes: list[list[int]] = []
    take_step, start = Trainer.take_step, Trainer.__init__

    def recording(self, **given):
        batch_loss = given["batch_loss"]

        def loss(batch):
            passes.append([int(number) for number in batch.example_ids])
            return batch_loss(batch)

        start(self, **(given | {"batch_loss": loss}))

    def recorded_step(self):
        passes.clear()
        done = take_step(self)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(passes) + "\n")
        return done

    Trainer.__init__, Trainer.take_step = recording, recorded_step


def main() -> None:
    set_defaults()
    processes, folder = int(sys.argv[1]), Path(sys.argv[2])
    rank = os.environ.get("RANK", "0")
    if "RANK" not in os.environ and processes > 1:
        from sftcli.services.launch import run_processes

        command = [sys.executable, "-m", "tests.support.recorded_process", *sys.argv[1:]]
        sys.exit(guarded(lambda: run_processes(processes, command), command="sft train"))
    folder.mkdir(parents=True, exist_ok=True)
    _record(folder / f"{rank}.jsonl")
    del sys.argv[1:3]
    app.main()


if __name__ == "__main__":
    main()
