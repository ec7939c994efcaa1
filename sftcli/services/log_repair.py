"""Bring the logs of a run that was killed back to the step that it goes on from."""

import json
from pathlib import Path

from sftcli import storage


def end_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        storage.disk.truncate(path, content.rfind(b"\n") + 1)


def lines_up_to(path: Path, step: int, *, owes_heldout: bool = False) -> list[str]:
    """Return the whole lines of an event log, without events of steps after ``step`` and without a torn last line.

    With ``owes_heldout`` the held-out loss of ``step`` will be measured again: a start that measured it and ended before that
    was saved has left one, which goes, and what was said because of it.
    """
    kept: list[str] = []
    is_measured_again = False
    if step < 0:
        return kept
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        at, kind = event.get("step"), event["event"]
        is_later = isinstance(at, int) and at > step
        if owes_heldout and at == step and kind == "HeldoutDone":
            is_measured_again = True
            continue
        if not is_later and kind != "FitEnded" and not (is_measured_again and kind == "Judged"):
            kept.append(line + "\n")
    return kept
