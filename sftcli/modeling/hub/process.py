"""The process that talks to the hub for us, which can be ended at any moment: started, read line by line, killed."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from sftcli.errors import redact

_TRUE = {"1", "true", "yes", "on"}


@contextmanager
def hub_worker(request: str) -> Iterator[tuple["queue.Queue[str]", IO[bytes]]]:
    """Yield the lines and the stderr of a process that answers ``request``; it is killed at the end of the block."""
    script = str(Path(__file__).with_name("worker.py"))
    with TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", script, request],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_pass_on, args=(process, lines), daemon=True)
        reader.start()
        try:
            yield lines, stderr
        finally:
            process.kill()
            process.wait()
            reader.join()
            if process.stdout is not None:
                process.stdout.close()


def _pass_on(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put('{"kind": "ended"}')


def next_line(lines: "queue.Queue[str]", seconds: float) -> dict[str, object]:
    """Return the next line, or nothing where none comes in time."""
    try:
        line = json.loads(lines.get(timeout=max(seconds, 0.001)))
    except queue.Empty:
        return {}
    return line if isinstance(line, dict) else {}


def number(line: Mapping[str, object], key: str) -> int:
    """Return a whole number of a line; 0 where it has none."""
    value = line.get(key)
    return value if isinstance(value, int) else 0


def last_line(stderr: IO[bytes]) -> str:
    """Return what the process said last, without tokens."""
    stderr.seek(0)
    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
    return redact(lines[-1]) if lines else "no message"


def endpoint() -> str:
    """Return the address of the hub, without what may be secret in it."""
    return redact(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).rstrip("/")


def offline_by() -> str:
    """Return the environment variable that forbids the hub; empty where none does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").lower() in _TRUE), "")
