"""Several processes of one command: starting them, and letting only the first one talk."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sftcli.cli.options.shared import Output
from sftcli.cli.session.session import session
from sftcli.cli.session.signals import CommandStopped
from sftcli.errors import ReportedByPeerError, SftError
from sftcli.events import Notice

_PR_SET_PDEATHSIG = 1


def is_one_of_several() -> bool:
    """Return whether a launcher has started this process together with others, of which none may be left."""
    from sftcli.services.processes.rank import is_launched

    return is_launched(os.environ)


def started() -> float:
    """Return when this process was started, by the monotonic clock; now, where the system does not tell."""
    try:
        fields = (
            Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return time.monotonic()


def is_first() -> bool:
    """Return whether this process is alone, or the first of several."""
    from sftcli.services.processes.rank import find_place

    place = find_place(os.environ)
    return place is None or place.rank == 0


def start_several(count: int, output: Output) -> int:
    """Run the command that this process was given in ``count`` processes; return its exit code."""
    with session(output) as current:
        current.emit(Notice(text=f"starting {count} processes"))
        from sftcli.services.processes.launch import run_processes
    return run_processes(count, [sys.executable, "-m", "sftcli", *sys.argv[1:]])


def rank_zero_output(run: Callable[[], object]) -> Callable[[], object]:
    """Return ``run`` for any process of a command: of several, only the first one shows anything.

    What fails before they have met fails in all of them alike, and is shown once on each machine.
    """

    def run_here() -> object:
        from sftcli.services.processes.rank import find_place, is_launched

        if not is_launched(os.environ):
            return run()
        place = find_place(os.environ)
        if place is None:
            _stop_with_launcher()
            return run()
        os.environ.setdefault("OMP_NUM_THREADS", str(place.threads))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a broken connection is told in our words
        _stop_with_launcher()
        return run() if place.rank == 0 else _muted(run, is_alike=place.local_rank > 0)

    return run_here


def _stop_with_launcher() -> None:
    """Have Linux send SIGUSR1, which saves and ends, when the launcher is killed: nothing else would end this process.

    It comes once for each thread that the launcher had, so it must not be a signal that is an order when it comes again.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1))


def _muted(run: Callable[[], object], *, is_alike: bool) -> object:
    streams = sys.stdout, sys.stderr
    with Path(os.devnull).open("a", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            return run()
        except (CommandStopped, ReportedByPeerError) as error:
            return error.exit_code
        except SftError as error:
            if is_alike:
                return error.exit_code
            raise
        finally:
            sys.stdout, sys.stderr = streams
