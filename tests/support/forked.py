"""Run a function in forked children: torch is imported already, so a crash or several processes cost milliseconds."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def run_forked(work: Callable[[], object]) -> int:
    """Return the exit code of ``work`` in a child: 0, 1 when it raised, or minus the signal that killed it."""
    return end_forked(start_forked(work))


def start_forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a child and return the number of its process."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads; the child uses none of them
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = (
                "1"  # a thread started here finds torch's pool broken by the fork
            )
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - the child must not return into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end_forked(child: int) -> int:
    """Wait for the end of a child and return its exit code, or minus the signal that killed it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
