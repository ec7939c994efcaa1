"""The time in which a command works: a view that shows it and a flag that stops it."""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sftcli.cli.options.shared import Output, OutputMode, choose_output
from sftcli.cli.session.signals import INTERRUPTED_EXIT_CODE, CommandStopped, SignalStop, stop_on_signals
from sftcli.errors import StoppedError
from sftcli.events import Notice, Session

if TYPE_CHECKING:
    from sftcli.events import Event


LOADING = Notice(text="loading torch and transformers")  # to be said before they are: it takes seconds


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


@dataclass(frozen=True, slots=True)
class CommandSession(Session):
    """The session of a command at a terminal, which signals stop."""

    stop: SignalStop

    def note(self, texts: Iterable[str]) -> None:
        """Say what a person should know about the sources of the settings."""
        for text in texts:
            self.emit(Notice(text=text))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Say that torch is loaded, which takes seconds. Nothing is begun, so the first signal ends the command at once."""
        self.emit(LOADING)
        with self.stop.impatient():
            yield


@contextmanager
def session(output: Output, *, every_steps: int = 10) -> Iterator[CommandSession]:
    """Show the events of a command and turn signals into a stop request while it runs.

    Handlers and terminal are as before when it ends, however it ends.

    Args:
        output: What the user said about output.
        every_steps: Steps between two lines where there is no live view.

    Raises:
        CommandStopped: The body raised ``StoppedError`` or ``KeyboardInterrupt``.
    """
    view = open_view(output, every_steps=every_steps)
    stop = SignalStop(enough=3 if is_signalled_twice(os.environ) else 2)

    def show_stopping() -> None:
        if not stop.is_impatient:  # else it ends at once
            view.show_stopping()

    with stop_on_signals(stop, show_stopping):
        view.open()
        try:
            yield CommandSession(view, stop)
        except StoppedError as error:
            raise CommandStopped(error.message, stop.exit_code) from error
        except KeyboardInterrupt as error:
            code = stop.exit_code if stop.requested() else INTERRUPTED_EXIT_CODE
            what = "interrupted while loading: nothing was begun" if stop.is_impatient else "interrupted"
            raise CommandStopped(str(error) or what, code) from error
        finally:
            view.close()


def is_signalled_twice(environ: Mapping[str, str]) -> bool:
    """Return whether each signal comes here twice: from Slurm, which signals all of a job, and from torchrun in that job."""
    return "SLURM_JOB_ID" in environ and "TORCHELASTIC_RUN_ID" in environ


def open_view(output: Output, *, every_steps: int) -> View:
    """Return the view for ``output`` on this stderr."""
    is_terminal = sys.stderr.isatty()
    columns = stderr_columns() if is_terminal else 0
    mode = choose_output(output, is_terminal=is_terminal, columns=columns)
    if mode is OutputMode.RICH:
        from sftcli.cli.terminal.tables import err
        from sftcli.cli.views.live import LiveView

        return LiveView(
            console=err(output.color), get_time=time.monotonic, redirect_stdout=sys.stdout.isatty()
        )
    if mode is OutputMode.EVENTS:
        from sftcli.cli.views.jsonl import JsonLinesView

        return JsonLinesView(stream=sys.stderr)
    from sftcli.cli.views.plain import PlainView, SilentView

    if mode is OutputMode.PLAIN:
        steps = 1 if output.verbose else every_steps
        return PlainView(stream=sys.stderr, get_time=time.monotonic, every_steps=steps, columns=columns)
    return SilentView(stream=sys.stderr)


def stderr_columns() -> int:
    """Return the width of the terminal on stderr, or what COLUMNS says."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
