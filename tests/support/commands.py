"""``sft`` in forked children: everything heavy is imported here, so a command costs what its work costs."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.support.forked import end_forked, start_forked

HEAVY = (
    "cli.app", "services.compare.run", "services.evaluate.evaluate", "services.evaluate.junit", "services.evaluate.trial.trial",
    "services.export.export", "services.export.push", "services.generate.file", "services.prepare.prepare",
    "services.report.html", "services.train.lead", "services.train.resume", "services.export.gguf",
    "data.prepared.parquet", "training.trainer",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """How a command ended, and all that it said."""

    code: int
    text: str


class Command:
    """``sft ARGUMENTS`` in a child, which calls ``prepare`` first; its output goes into the file ``output``."""

    def __init__(
        self, arguments: Sequence[object], output: Path, prepare: Callable[[], object] = lambda: None
    ) -> None:
        self.arguments, self.output, self.prepare = ["sft", *map(str, arguments)], output, prepare
        self.child = start_forked(self._work)

    def end(self) -> Said:
        """Wait for it."""
        code = end_forked(self.child)
        return Said(code, self.output.read_text(encoding="utf-8", errors="replace"))

    def _work(self) -> None:
        from sftcli.cli.app import main

        sys.argv = self.arguments
        with self.output.open("w", buffering=1, encoding="utf-8") as file:
            sys.stdout = sys.stderr = file
            self.prepare()
            main()


def import_all() -> None:
    """Import what commands need, once for all children."""
    for name in HEAVY:
        import_module(f"sftcli.{name}")


def run_command(
    arguments: Sequence[object], output: Path, prepare: Callable[[], object] = lambda: None
) -> Said:
    """Return how ``sft ARGUMENTS`` ends."""
    return Command(arguments, output, prepare).end()


def run_together(commands: Sequence[Sequence[object]], outputs: Path) -> list[Said]:
    """Start several commands, let them go at one moment, and return how each ends."""
    reader, writer = os.pipe()

    def wait() -> None:
        os.close(writer)
        os.read(reader, 1)  # ends when the parent closes its end

    started = [
        Command(arguments, outputs / f"said-{number}.txt", wait) for number, arguments in enumerate(commands)
    ]
    os.close(reader)
    os.close(writer)
    return [command.end() for command in started]
