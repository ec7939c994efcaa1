"""``sft`` in two processes with a fault in the second one: ``python -m tests.support.faulty_process FAULT train ...``."""

import os
import sys

from sftcli.cli import app
from sftcli.cli.errors_view import guarded
from sftcli.environment import set_defaults

PASSES_BEFORE = 4  # that the second process takes part in without a fault


def _fail(kind: str, nll, batch):
    import torch

    from sftcli.errors import DataError

    match kind:
        case "memory" if len(batch.example_ids) > 1:
            raise torch.OutOfMemoryError("no memory left")
        case "no-memory":
            raise torch.OutOfMemoryError("no memory left")
        case "nan" | "nans":
            return nll * float("nan")
        case "bug":
            raise TypeError("an error nobody expected")
        case "data":
            raise DataError("row 7 cannot be read", hint="mend it")
    return nll


def _with_fault(kind: str) -> None:
    import torch

    from sftcli.services import building

    choose = building.choose_batch_loss

    def choose_faulty(*args, **kwargs):
        batch_loss, passes = choose(*args, **kwargs), 0

        def loss(batch):
            nonlocal passes
            nll = batch_loss(batch)
            passes += torch.is_grad_enabled()
            is_time = passes == PASSES_BEFORE + 1 if kind == "nan" else passes > PASSES_BEFORE
            return _fail(kind, nll, batch) if is_time and torch.is_grad_enabled() else nll

        return loss

    building.choose_batch_loss = choose_faulty


def main() -> None:
    set_defaults()
    kind = sys.argv[1]
    rank = os.environ.get("RANK")
    if rank is None:
        from sftcli.services.launch import run_processes

        command = [sys.executable, "-m", "tests.support.faulty_process", *sys.argv[1:]]
        sys.exit(guarded(lambda: run_processes(2, command), command="sft train"))
    if rank == "1":
        _with_fault(kind)
    del sys.argv[1]
    app.main()


if __name__ == "__main__":
    main()
