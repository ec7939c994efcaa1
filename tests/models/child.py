"""Runs `sft` and other work in forked children of a process that has everything imported: the same code, no start-up time."""

import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - for the children
import torch

import sftcli
from sftcli.cli.app import main as sft_main
from tests.support.forked import end_forked, run_forked, start_forked

_SECONDS = 240


def prepare_children(out: Path) -> None:
    """Import what children need, and let all that they keep go to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"SFT_CACHE_DIR": str(out / "cache"), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    for module in pkgutil.walk_packages(sftcli.__path__, "sftcli."):
        with suppress(ImportError):  # an extra that is not installed
            importlib.import_module(module.name)


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int  # minus the signal that ended it
    out: str
    err: str

    @property
    def last(self) -> str:
        """Return the line that says what went wrong."""
        lines = self.err.strip().splitlines() or [""]
        return next((line for line in reversed(lines) if line.startswith(("error", "internal"))), lines[-1])


@dataclass(frozen=True)
class Command:
    """A command that runs."""

    child: int
    logs: Path

    def end(self) -> Done:
        """Wait for its end."""
        code = end_forked(self.child)
        out, err = (self.logs.with_suffix(ending).read_text(errors="replace") for ending in (".out", ".err"))
        return Done(code, out, err)


def start_sft(
    words: Sequence[str], *, folder: Path, name: str, environ: Mapping[str, str] | None = None
) -> Command:
    """Start `sft` with ``words`` in ``folder``; what it writes goes to its ``logs``, under ``name``."""
    logs = folder / "logs" / name
    logs.parent.mkdir(exist_ok=True)
    return Command(start_forked(partial(_sft, words, folder, logs, environ or {})), logs)


def run_sft(*words: str, folder: Path, name: str, environ: Mapping[str, str] | None = None) -> Done:
    """Run `sft` with ``words`` in ``folder``."""
    return start_sft(words, folder=folder, name=name, environ=environ).end()


def call(work: Callable[..., Any], *args: object) -> Any:
    """Return what ``work`` returns in a child, as JSON has it.

    Raises:
        RuntimeError: It raised an error, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, log = Path(folder) / "found.json", Path(folder) / "log"
        code = run_forked(partial(_write_found, work, args, found, log))
        if code:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise RuntimeError(lines[-1])
        return json.loads(found.read_text(encoding="utf-8"))


def _sft(words: Sequence[str], folder: Path, logs: Path, environ: Mapping[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environ
    _write_to(logs.with_suffix(".out"), logs.with_suffix(".err"))
    sys.argv = ["sft", *words]
    try:
        sft_main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _write_found(work: Callable[..., Any], args: Sequence[object], found: Path, log: Path) -> None:
    _write_to(log, log)
    found.write_text(json.dumps(work(*args)), encoding="utf-8")


def _write_to(out: Path, err: Path) -> None:
    """Let this process write to files, read nothing, and end after a while."""
    signal.alarm(_SECONDS)
    err.unlink(missing_ok=True)
    with Path(os.devnull).open("rb") as nothing, out.open("wb") as one, err.open("ab") as other:
        for file, number in ((nothing, 0), (one, 1), (other, 2)):
            os.dup2(file.fileno(), number)
