"""From arguments to an exit code: the time in which a command works, and what becomes of what it raises."""

import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import ENOSPC
from typing import TYPE_CHECKING, Protocol

import typer

from sftcli.cli.errors_view import show_crash, show_error, write_error_json
from sftcli.cli.options import Color, Output, OutputMode, choose_output
from sftcli.cli.signals import INTERRUPTED_EXIT_CODE, SignalStop, stop_on_signals
from sftcli.errors import SftError, StoppedError, StorageError, UsageError
from sftcli.events import fan_out

if TYPE_CHECKING:
    from sftcli.events import Event, EventSink

BROKEN_PIPE_EXIT_CODE = 141


class View(Protocol):
    """A sink with a beginning, an end, and an answer to a stop request."""

    def __call__(self, event: "Event", /) -> None:
        """Show an event."""
        ...

    def open(self) -> None:
        """Begin to show."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...

    def show_stopping(self) -> None:
        """Say that a stop was asked for."""
        ...


class CommandStopped(Exception):  # noqa: N818 - the user's will, not a fault
    """A command ended before its end because of a signal; ``exit_code`` tells which."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def session(
    output: Output, *, every_steps: int = 10, stream_text: bool = False
) -> Iterator[tuple["EventSink", SignalStop]]:
    """Show the events of a command and turn signals into a stop request while it runs.

    Handlers and terminal are as before when it ends, however it ends.

    Args:
        output: What the user said about output.
        every_steps: Steps between two lines where there is no live view.
        stream_text: Whether generated text is the result, and goes to stdout as it comes.

    Raises:
        CommandStopped: The body raised ``StoppedError`` or ``KeyboardInterrupt``.
    """
    view = open_view(output, every_steps=every_steps)
    sink: EventSink = view
    if stream_text and not output.json:
        from sftcli.cli.lines import stdout_text_writer

        sink = fan_out(view, stdout_text_writer())
    stop = SignalStop()
    with stop_on_signals(stop, view.show_stopping):
        view.open()
        try:
            yield sink, stop
        except StoppedError as error:
            raise CommandStopped(error.message, stop.exit_code) from error
        except KeyboardInterrupt as error:
            raise CommandStopped("interrupted", INTERRUPTED_EXIT_CODE) from error
        finally:
            view.close()


def open_view(output: Output, *, every_steps: int) -> View:
    """Return the view for ``output`` on this stderr."""
    is_terminal = sys.stderr.isatty()
    mode = choose_output(output, is_terminal=is_terminal, columns=_columns() if is_terminal else 0)
    if mode is OutputMode.RICH:
        from sftcli.cli.progress import LiveView
        from sftcli.cli.tables import err

        return LiveView(
            console=err(output.color), get_time=time.monotonic, redirect_stdout=sys.stdout.isatty()
        )
    from sftcli.cli.lines import PlainView, SilentView

    if mode is OutputMode.PLAIN:
        steps = 1 if output.verbose else every_steps
        return PlainView(stream=sys.stderr, get_time=time.monotonic, every_steps=steps)
    return SilentView(stream=sys.stderr)


def _columns() -> int:
    """Return the width of the terminal on stderr, or what COLUMNS says."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def run(app: typer.Typer, arguments: Sequence[str], *, environ: Mapping[str, str]) -> int:
    """Run ``sft`` and return the exit code of the process; whatever was raised has been shown.

    Args:
        app: The program.
        arguments: Its arguments, without the program name.
        environ: The environment.
    """
    make_streams_safe()
    shown = Shown(arguments, environ)
    try:
        code = app(list(arguments), prog_name="sft", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the one place where every way out becomes an exit code
        try:
            return shown.exit_code_of(error)
        except (OSError, ValueError):  # stdout or stderr cannot be written to
            _let_go_of_stdout()
            return shown.code
    return code if isinstance(code, int) else 0


class Shown:
    """Shows what a command raised, in the form that its arguments ask for."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        name = options[0] if options and not options[0].startswith("-") else ""
        self.command = f"sft {name}".strip()
        self.json = "--json" in options
        self.color = _color_of(options)
        self.debug = environ.get("SFT_DEBUG") == "1"
        self.code = 1

    def exit_code_of(self, error: BaseException) -> int:
        """Show ``error`` and return its exit code.

        Raises:
            OSError: Nothing can be shown; the code is in ``code``.
        """
        match error:
            case CommandStopped():
                self.code = error.exit_code
                self._say_stopped(str(error))
            case SftError():
                self._show(error)
            case SystemExit():
                self._leave(error)
            case KeyboardInterrupt() | typer.Abort():
                self.code = INTERRUPTED_EXIT_CODE
                self._say_stopped("interrupted")
            case BrokenPipeError():
                self._leave_pipe()
            case OSError(errno=number) if number == ENOSPC:
                _let_go_of_stdout()
                where = f" for {error.filename}" if error.filename else ""
                self._show(StorageError(f"no space left{where}", hint="free some space and run it again"))
            case _ if (usage := _usage_error(error)) is not None:
                self._show(usage)
            case _:
                show_crash(error, command=self.command, json=self.json, color=self.color, debug=self.debug)
        return self.code

    def _show(self, error: SftError) -> None:
        self.code = error.exit_code
        show_error(error, command=self.command, json=self.json, color=self.color)

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
        _let_go_of_stdout()


def _usage_error(error: BaseException) -> UsageError | None:
    """Return what Typer found wrong with the arguments, as an error of ours.

    Typer's own classes for it are private; its public ``BadParameter`` shares their methods.
    """
    tell = getattr(error, "format_message", None)
    if not callable(tell):
        return None
    path = getattr(getattr(error, "ctx", None), "command_path", "sft")
    return UsageError(str(tell()).rstrip("."), hint=f"see `{path} --help`")


def _color_of(arguments: Sequence[str]) -> Color:
    """Return the colour choice in ``arguments``, before or even though they cannot be parsed."""
    choice = Color.AUTO
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        value = (
            argument[8:] if argument.startswith("--color=") else following if argument == "--color" else ""
        )
        if value in set(Color):
            choice = Color(value)
    return choice


def make_streams_safe() -> None:
    """Make stdout and stderr take every character in every locale, and exist.

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


def _let_go_of_stdout() -> None:
    """Point stdout at nothing, so that the interpreter does not complain about it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
