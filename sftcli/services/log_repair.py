"""Bring the logs of a run that was killed back to the step that it goes on from."""

import json
from pathlib import Path

from sftcli import storage


def end_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        storage.disk.truncate(path, content.rfind(b"\n") + 1)


def lines_up_to(path: Path, step: int) -> list[str]:
    """Return the whole lines of an event log, without events of steps after ``step`` and without a torn last line."""
    kept: list[str] = []
    if step < 0:
        return kept
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if not (isinstance(event.get("step"), int) and event["step"] > step) and event["event"] != "FitEnded":
            kept.append(line + "\n")
    return kept
