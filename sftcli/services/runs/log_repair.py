"""Bring files of lines, which a crash may have torn at any byte, back to the lines in them that are whole."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli import storage


@dataclass(frozen=True, slots=True)
class Lines:
    """The whole lines of a file, each a JSON object, with its text and end; and how many others there were."""

    found: tuple[tuple[str, Mapping[str, object]], ...]
    damaged: int

    def told(self, path: Path) -> str:
        """Return in words what was left out; empty where all lines are whole."""
        if not self.damaged:
            return ""
        what = "a line that is" if self.damaged == 1 else f"{self.damaged} lines that are"
        return f"{path}: {what} not whole, as after a kill or on a full disk, left out"


def read_lines(path: Path) -> Lines:
    """Read a file of JSON objects; a line that is torn, or not one, is counted and left out."""
    pieces = path.read_bytes().split(b"\n")
    lines = [*map(_parsed, pieces[:-1])]
    whole = tuple(line for line in lines if line is not None)
    return Lines(found=whole, damaged=len(lines) - len(whole) + bool(pieces[-1]))


def _parsed(line: bytes) -> tuple[str, Mapping[str, object]] | None:
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return (text + "\n", value) if isinstance(value, dict) else None


def end_torn_line(path: Path) -> str:
    """Cut off a last line that a crash left without its end; return in words that it was."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        storage.disk.truncate(path, content.rfind(b"\n") + 1)
        return Lines(found=(), damaged=1).told(path)
    return ""


def lines_up_to(lines: Lines, step: int, *, owes_heldout: bool = False) -> Iterator[str]:
    """Yield the lines of an event log without the events of steps after ``step``, none for -1.

    With ``owes_heldout`` the held-out loss of ``step`` will be measured again: a start that measured it and ended before that
    was saved has left one, which goes, and what was said because of it.
    """
    is_measured_again = False
    for text, event in lines.found if step >= 0 else ():
        at, kind = event.get("step"), event.get("event")
        is_later = isinstance(at, int) and at > step
        if owes_heldout and at == step and kind == "HeldoutDone":
            is_measured_again = True
        elif not (is_later or kind in {None, "FitEnded"} or (is_measured_again and kind == "Judged")):
            yield text
