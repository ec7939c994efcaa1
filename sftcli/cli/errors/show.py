"""Errors as a person or a script reads them, and the way from an exception to an exit code."""

import errno
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sftcli import storage
from sftcli.cli.errors.arguments import usage_error
from sftcli.cli.options.shared import Color, use_color
from sftcli.cli.session.session import stderr_columns
from sftcli.cli.session.signals import INTERRUPTED_EXIT_CODE, CommandStopped
from sftcli.cli.terminal.text import clean, wrapped, writable
from sftcli.errors import OutputError, ReportedByPeerError, SftError, StorageError, UsageError, redact
from sftcli.memory_faults import is_out_of_memory, out_of_memory

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.errors import Location


_MAX_SOURCE_BYTES = 64 * 1024 * 1024
_COLUMNS = 72
_FEWEST_COLUMNS = 30  # on fewer no words are kept together


def source_excerpt(location: "Location") -> tuple[str, str, str] | None:
    """Return line number, text of the line and blanks up to the column; ``None`` where any of them is not known.

    Of a long line only the part around the column is returned.
    """
    if location.file is None or location.line is None or location.column is None:
        return None
    source = _read_line(Path(location.file), location.line)
    if source is None or location.column > len(source) + 1:
        return None
    start = max(0, location.column - 1 - _COLUMNS // 2)
    shown = source[start : start + _COLUMNS]
    before = clean(shown[: location.column - 1 - start])
    return str(location.line), clean(shown), " " * len(before)


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


_OF_DISKS = storage.FULL_DISK | {
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
}

BUG_EXIT_CODE = 1
BROKEN_PIPE_EXIT_CODE = 141

_RED, _CYAN, _DIM, _BOLD, _RESET = "\x1b[1;31m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def guarded(run: Callable[[], object], *, command: str, json: bool = False, color: Color = Color.AUTO) -> int:
    """Call ``run`` and return the exit code of the process; whatever was raised has been shown.

    Args:
        run: The command; an ``int`` that it returns is the exit code, anything else is 0.
        command: Its name, such as ``sft train``.
        json: Whether the failure goes to stdout as a JSON object.
        color: When to color.
    """
    make_streams_safe()
    ending = _Ending(command=command, json=json, color=color)
    try:
        code = run()
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the one place where every way out becomes an exit code
        with suppress(OSError, ValueError):  # there may be nowhere left to say it
            ending.show(error)
    else:
        ending.code = code if isinstance(code, int) else 0
    for stream in (sys.stdout, sys.stderr):
        _drop_if_unwritable(stream)
    return ending.code


@dataclass(slots=True, kw_only=True)
class _Ending:
    """Shows what a command raised; ``code`` is the exit code, also when showing it failed."""

    command: str
    json: bool
    color: Color
    code: int = BUG_EXIT_CODE

    def show(self, error: BaseException) -> None:
        """Show ``error`` and set ``code``."""
        match error:
            case CommandStopped():
                self.code = error.exit_code
                self._say_stopped(str(error))
            case SftError():
                self._show(error)
            case ReportedByPeerError():
                self.code = error.exit_code
            case SystemExit():
                self._leave(error)
            case KeyboardInterrupt() | typer.Abort():
                self.code = INTERRUPTED_EXIT_CODE
                self._say_stopped("interrupted")
            case BrokenPipeError():
                self._leave_pipe()
            case OSError(errno=number) if number in _OF_DISKS:
                _drop_if_unwritable(sys.stdout)
                self._show(_disk_error(error))
            case _ if is_out_of_memory(error):
                self._show(out_of_memory())
            case _ if (usage := usage_error(error, self.command, sys.argv[1:])) is not None:
                self._show_usage(usage)
            case _:
                show_crash(error, command=self.command, json=self.json, color=self.color)

    def _show(self, error: SftError) -> None:
        self.code = error.exit_code
        show_error(error, command=self.command, json=self.json, color=self.color)

    def _show_usage(self, error: UsageError) -> None:
        self.code = error.exit_code
        if error.message:  # else Typer has shown the help of a command that was given no arguments
            self._show(error)

    def _say_stopped(self, message: str) -> None:
        if self.json:
            write_error_json(self.code, "stopped", message, "")
        else:
            sys.stderr.write(f"{message}\n")

    def _leave(self, error: SystemExit) -> None:
        if isinstance(error.__context__, BrokenPipeError):  # Typer makes 1 of it
            self._leave_pipe()
        else:
            self.code = error.code if isinstance(error.code, int) else int(error.code is not None)

    def _leave_pipe(self) -> None:
        self.code = BROKEN_PIPE_EXIT_CODE
        _let_go_of(sys.stdout)


def _disk_error(error: OSError) -> SftError:
    """Return the error of a disk that nobody has said anything about: a failing disk is no bug of ours."""
    where = f" for {error.filename}" if error.filename else ""
    if error.errno in storage.FULL_DISK:
        return StorageError(f"no space left{where}", hint="free some space and run it again")
    if error.errno == errno.EROFS:
        return OutputError(
            f"the disk takes no writes{where}: {error.strerror}",
            hint="check the drive, or name another place",
        )
    return StorageError(f"the disk failed{where}: {error.strerror}", hint="check the drive and run it again")


def make_streams_safe() -> None:
    """Make stdout and stderr take every character in every locale, and exist, and stdin give every byte.

    Closed by the caller, stdout becomes a pipe that nobody reads, so that a lost result is noticed; stderr is let go.
    """
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # it was read from before
            sys.stdin.reconfigure(errors="surrogateescape")  # who reads it says what is wrong with its bytes


def _drop_if_unwritable(stream: "TextIO") -> None:
    """Flush ``stream``, and let go of it where that fails: the interpreter would complain at exit and end with 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        _let_go_of(stream)


def _let_go_of(stream: "TextIO") -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_error(error: SftError, *, command: str, json: bool = False, color: Color = Color.AUTO) -> None:
    """Show an expected error: what, where, and what to do, on stderr; or one JSON object on stdout."""
    about_flags = error.kind == "usage" and error.location.file is None
    hint = error.hint or (f"see `{command} --help`" if about_flags else "")
    if json:
        write_error_json(error.exit_code, error.kind, error.message, hint, error.location)
        return
    colored = use_color(color, is_terminal=sys.stderr.isatty())
    lines = [_told("error", error.message, _RED, colored=colored)]
    place = str(error.location)
    if place and not _is_told(error.location, error.message):
        lines.append(f"{_paint('  -->', _CYAN, colored=colored)} {clean(place)}")
    if "\n" not in error.message:  # else the message brings its own excerpt
        lines += _excerpt(error.location, colored=colored)
    if hint:
        lines.append(_told("help", hint, _BOLD, colored=colored))
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
            _told("error", message, _RED, colored=colored),
            _told("help", hint, _BOLD, colored=colored),
        ]
    )


def _told(word: str, text: str, code: str, *, colored: bool) -> str:
    """Return ``error: text``, broken between words on a terminal; logs and pipes keep whole lines."""
    told = f"{word}: {writable(redact(clean(text, keep=chr(10))), sys.stderr.encoding)}"
    if sys.stderr.isatty():
        told = wrapped(told, max(_FEWEST_COLUMNS, stderr_columns()))
    return _paint(word + ":", code, colored=colored) + told[len(word) + 1 :]


def _is_told(location: "Location", message: str) -> bool:
    """Return whether ``message`` says where already, the column aside."""
    if location.file is None:
        return location.key is None or location.key in message
    place = location.file if location.line is None else f"{location.file}:{location.line}"
    return place in message and (location.column is None or f"{place}:{location.column}" in message)


def _excerpt(location: "Location", *, colored: bool) -> list[str]:
    found = source_excerpt(location)
    if found is None:
        return []
    number, text, blanks = found
    margin = " " * len(number)
    bar = _paint("|", _DIM, colored=colored)
    return [
        f"{margin} {bar}",
        f"{_paint(number, _DIM, colored=colored)} {bar} {text}".rstrip(),
        f"{margin} {bar} {blanks}{_paint('^', _RED, colored=colored)}",
    ]


def write_error_json(
    code: int, kind: str, message: str, hint: str, location: "Location | None" = None
) -> None:
    """Write a failure as the one JSON object of a command."""
    from sftcli.cli.terminal.tables import write_json

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
    from sftcli import storage

    name = f"{command.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (_state_folder(), Path(tempfile.gettempdir())):
        try:
            storage.make_folders(folder)
            path = folder / name
            with storage.disk.create_alone(path, mode=0o600) as file:
                storage.disk.write(file, report.encode("utf-8", "backslashreplace"))
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
