"""``sft`` in two processes with a fault in the second one: ``python -m tests.support.faulty_process FAULT train ...``."""

import os
import sys

from sftcli.cli import app
from sftcli.cli.errors.show import guarded
from sftcli.environment import set_defaults

GOOD_STEPS = 4  # before the fault


def _fail(fault: str, nll=None, rows: int = 0):
    import torch

    from sftcli.errors import DataError

    match fault:
        case "memory" if rows > 1:
            raise torch.OutOfMemoryError("no memory left")
        case "no-memory":
            raise torch.OutOfMemoryError("no memory left")
        case "bug":
            raise TypeError("an error nobody expected")
        case "data":
            raise DataError("row 7 cannot be read", hint="mend it")
        case "nan" | "nans":
            return nll * float("nan")
    return nll


def _with_fault(kind: str) -> None:
    """Make trainers fail as ``kind`` says, at a place that it may name: ``memory@forward``; else when a pass is computed."""
    import torch

    from sftcli.services.train.run import TrainingRun
    from sftcli.training.trainer import Trainer
    from sftcli.training.weights.sharded import layers_of

    fault, _, place = kind.partition("@")

    class FaultyTrainer(Trainer):
        def __init__(self, **parts):
            super().__init__(**parts)
            whole, self.rows_of_pass = self.batch_loss, 0

            def batch_loss(batch):
                self.rows_of_pass = len(batch.example_ids)
                nll = whole(batch)
                return _fail(fault, nll, self.rows_of_pass) if self.is_time() and not place else nll

            self.batch_loss = batch_loss
            if place:
                layers_of(self.weights.model)[-1].register_forward_hook(self.fail_inside)

        def is_time(self):
            is_after = self.state.step > GOOD_STEPS and fault != "nan"  # one NaN, and then no more
            return torch.is_grad_enabled() and (self.state.step == GOOD_STEPS or is_after)

        def fail_inside(self, _layer, _inputs, hidden):
            if self.is_time() and place == "forward":
                _fail(fault, rows=self.rows_of_pass)
            if self.is_time() and place == "backward":
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                rows = self.rows_of_pass
                hidden.register_hook(lambda gradient: _fail(fault, gradient, rows))

    TrainingRun.trainer_type = FaultyTrainer


def main() -> None:
    set_defaults()
    kind = sys.argv[1]
    rank = os.environ.get("RANK")
    if rank is None:
        from sftcli.services.processes.launch import run_processes

        command = [sys.executable, "-m", "tests.support.faulty_process", *sys.argv[1:]]
        sys.exit(guarded(lambda: run_processes(2, command), command="sft train"))
    if rank == "1":
        _with_fault(kind)
    del sys.argv[1]
    app.main()


if __name__ == "__main__":
    main()
