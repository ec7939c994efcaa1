"""Run a function in a forked child: torch is imported already, so a crash costs milliseconds."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def run_forked(work: Callable[[], object]) -> int:
    """Return the exit code of ``work`` in a child: 0, 1 when it raised, or minus the signal that killed it."""
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
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
