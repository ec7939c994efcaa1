"""Errors as a person or a script reads them."""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.cli.options import Color, use_color
from sftcli.cli.text import clean, redact, writable

if TYPE_CHECKING:
    from sftcli.errors import Location, SftError

BUG_EXIT_CODE = 1

_MAX_SOURCE_BYTES = 64 * 1024 * 1024
_EXCERPT_COLUMNS = 72
_RED, _CYAN, _DIM, _BOLD, _RESET = "\x1b[1;31m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def show_error(error: "SftError", *, command: str, json: bool = False, color: Color = Color.AUTO) -> None:
    """Show an expected error: what, where, and what to do, on stderr; or one JSON object on stdout."""
    hint = error.hint or (f"see `{command} --help`" if error.kind == "usage" else "")
    if json:
        write_error_json(error.exit_code, error.kind, error.message, hint, error.location)
        return
    colored = use_color(color, is_terminal=sys.stderr.isatty())
    lines = [_headline("error", error.message, colored=colored)]
    place = str(error.location)
    if place and not _is_told(error.location, error.message):
        lines.append(f"{_paint('  -->', _CYAN, colored=colored)} {clean(place)}")
    lines += _excerpt(error.location, colored=colored)
    if hint:
        lines.append(f"{_paint('help:', _BOLD, colored=colored)} {clean(hint, keep=chr(10))}")
    _write(lines)


def show_crash(error: BaseException, *, command: str, json: bool = False, color: Color = Color.AUTO) -> None:
    """Show a bug of ours: one line and the path of a file with the traceback, or with ``SFT_DEBUG=1`` all of it."""
    report = redact("".join(traceback.format_exception(error)))
    name = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    message = f"{command} hit a bug: {name.splitlines()[0]}"
    path = _save_report(command, report)
    hint = (
        f"the traceback is in {path}; please report it"
        if path
        else "run again with SFT_DEBUG=1 for a traceback"
    )
    if os.environ.get("SFT_DEBUG") == "1":
        _write(clean(report.rstrip("\n"), keep="\n").split("\n"))
    if json:
        write_error_json(BUG_EXIT_CODE, "internal", message, hint)
        return
    colored = use_color(color, is_terminal=sys.stderr.isatty())
    _write(
        [
            _headline("error", message, colored=colored),
            f"{_paint('help:', _BOLD, colored=colored)} {clean(hint)}",
        ]
    )


def _headline(word: str, message: str, *, colored: bool) -> str:
    return f"{_paint(word + ':', _RED, colored=colored)} {clean(message, keep=chr(10))}"


def _is_told(location: "Location", message: str) -> bool:
    """Return whether ``message`` says where already, the column aside."""
    if location.file is None:
        return location.key is None or location.key in message
    place = location.file if location.line is None else f"{location.file}:{location.line}"
    return place in message and (location.column is None or f"{place}:{location.column}" in message)


def _excerpt(location: "Location", *, colored: bool) -> list[str]:
    """Return the line of the file that is at fault with a caret under the column, if both are known."""
    if location.file is None or location.line is None or location.column is None:
        return []
    source = _read_line(Path(location.file), location.line)
    if source is None or location.column > len(source) + 1:
        return []
    start = max(0, location.column - 1 - _EXCERPT_COLUMNS // 2)
    shown = source[start : start + _EXCERPT_COLUMNS]
    before = clean(shown[: location.column - 1 - start])
    number = str(location.line)
    blank = " " * len(number)
    bar = _paint("|", _DIM, colored=colored)
    return [
        f"{blank} {bar}",
        f"{_paint(number, _DIM, colored=colored)} {bar} {clean(shown)}",
        f"{blank} {bar} {' ' * len(before)}{_paint('^', _RED, colored=colored)}",
    ]


def _read_line(path: Path, line: int) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_SOURCE_BYTES:
            return None
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if number == line:
                    return text.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
    except OSError:
        pass  # the error itself is shown either way
    return None


def write_error_json(
    code: int, kind: str, message: str, hint: str, location: "Location | None" = None
) -> None:
    """Write a failure as the one JSON object of a command."""
    from sftcli.cli.tables import write_json

    write_json(
        {
            "ok": False,
            "exit_code": code,
            "error": {
                "kind": kind,
                "message": redact(message),
                "hint": redact(hint),
                "file": location.file if location else None,
                "line": location.line if location else None,
                "column": location.column if location else None,
                "key": location.key if location else None,
            },
        }
    )


def _save_report(command: str, report: str) -> Path | None:
    """Write a traceback into the state folder of the user, else a temporary one; ``None`` if neither can be written."""
    name = f"{command.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (_state_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / name
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(report)
        except (OSError, RuntimeError):
            continue
        return path
    return None


def _state_folder() -> Path:
    root = os.environ.get("XDG_STATE_HOME", "")
    base = Path(root) if root.startswith("/") else Path.home() / ".local" / "state"
    return base / "sft" / "log"


def _paint(text: str, code: str, *, colored: bool) -> str:
    return f"{code}{text}{_RESET}" if colored else text


def _write(lines: list[str]) -> None:
    for line in lines:
        sys.stderr.write(writable(redact(line), sys.stderr.encoding) + "\n")
    sys.stderr.flush()
