"""Signals as a stop flag. Knows nothing about views: it is given a function to call."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import socketpair
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING

from sftcli.errors import STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from socket import socket
    from types import FrameType

INTERRUPTED_EXIT_CODE = 130

# SIGUSR1 is how a scheduler such as Slurm says that the time is nearly up.
STOP_SIGNALS = frozenset(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if name in signal.Signals.__members__
)
SAVE_SIGNALS = frozenset(signal.Signals[name] for name in ("SIGUSR2",) if name in signal.Signals.__members__)
# Twice one of these is an order to end at once. SIGUSR1 is not: a scheduler sends SIGTERM after it while the save runs.
_IMPATIENT = frozenset(STOP_SIGNALS - {signal.Signals.__members__.get("SIGUSR1")})


class CommandStopped(Exception):  # noqa: N818 - the user's will, not a fault
    """A command ended before its end because of a signal; ``exit_code`` tells which."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class SignalStop:
    """The stop flag of a command, raised by a signal. It remembers which one came first."""

    signal_number: int | None = None
    enough: int = 2  # of one signal, to end at once
    is_impatient: bool = False  # nothing is begun that could be ended well: one signal fewer is enough
    _saves: int = 0  # asked for and not yet handed on
    _is_over: bool = False  # enough came, and the command was told so
    _handled: Counter[int] = field(default_factory=Counter)
    _received: Counter[int] = field(default_factory=Counter)  # several may reach the handler as one

    def requested(self) -> bool:
        """Return true once a signal came."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a command that was stopped: 128 + signal; 75 for SIGUSR1 and without any signal."""
        if self.signal_number is None or signal.Signals(self.signal_number).name == "SIGUSR1":
            return STOPPED_EXIT_CODE
        return 128 + self.signal_number

    def handle(self, number: int, _frame: "FrameType | None") -> None:
        """Note a signal.

        Raises:
            KeyboardInterrupt: It is SIGINT, SIGTERM or SIGHUP, and enough of it came.
        """
        if number in SAVE_SIGNALS:
            self._saves += 1
            return
        if self.signal_number is None:
            self.signal_number = number
        if number in _IMPATIENT:
            self._handled[number] += 1
            if max(self._handled[number], self._received[number]) >= self.enough:
                self._is_over = True
                raise KeyboardInterrupt

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Let one signal fewer be enough in the block. What raises in it leaves it so, for the words of the end."""
        self.is_impatient, self.enough = True, self.enough - 1
        yield
        self.is_impatient, self.enough = False, self.enough + 1

    def save_requested(self) -> bool:
        """Return true once for any number of SIGUSR2 that came since the last question."""
        asked, self._saves = self._saves > 0, 0
        return asked

    def count_received(self, number: int) -> bool:
        """Count a signal when it arrives, which may be long before its handler can run.

        Returns:
            Whether it makes enough of them and the handler has not seen it: the interpreter takes a signal for the one
            before while that one's handler is still to run, and may have run it before this was counted.
        """
        self._received[number] += 1
        return number in _IMPATIENT and self._received[number] == self.enough and not self._is_over


@contextmanager
def stop_on_signals(stop: SignalStop, show_stopping: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise ``stop``, and SIGUSR2 ask it for a save, instead of ending the process.

    Python runs a handler only between two instructions of the main thread, and one backward pass may take seconds. So a
    second thread is told of the signal by the interpreter itself and calls ``show_stopping`` at once, once. It is an
    ordinary thread: it may take locks and draw, which a handler may not.
    """
    if current_thread() is not main_thread():
        yield  # only the main thread may install handlers; those of the host program stay in charge
        return
    reader, writer = socketpair()
    writer.setblocking(False)
    watcher = Thread(target=_watch, args=(reader, stop, show_stopping), name="signals", daemon=True)
    watcher.start()
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A signal that was ignored from outside, as by nohup, stays ignored.
    taken = {
        number for number in STOP_SIGNALS | SAVE_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    }
    old = {number: signal.signal(number, stop.handle) for number in taken}
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _leave_to_parent(taken))
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(old_fd)
        taken.clear()
        writer.close()  # ends the watcher
        watcher.join(timeout=1)
        reader.close()


def _leave_to_parent(taken: set[signal.Signals]) -> None:
    """In a forked worker: let SIGTERM end it, as pools expect, and leave Ctrl-C to the parent, which ends the pool."""
    if taken:
        signal.set_wakeup_fd(-1)
        for number in taken:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        taken.clear()


def _watch(reader: "socket", stop: SignalStop, show_stopping: Callable[[], None]) -> None:
    is_told = False
    while received := reader.recv(16):
        for number in received:
            if stop.count_received(number):
                signal.pthread_kill(main_thread().ident or 0, number)
            if not is_told and number in STOP_SIGNALS:
                is_told = True
                show_stopping()
