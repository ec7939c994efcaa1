"""Several processes of one command on this machine, started by what torchrun starts them with.

It passes signals on, keeps the store at which they meet, and ends all of them within seconds once one has died.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext

from sftcli.errors import STOPPED_EXIT_CODE, ResourceError, UsageError
from sftcli.services.processes.failures import describe_failure, error_of, exit_code_of, lost_peer
from sftcli.services.processes.meeting import PREFIX, prefixed, tcp_store
from sftcli.services.processes.peers import OVER
from sftcli.services.processes.pulse import FAILURE
from sftcli.services.processes.rank import ATTEMPT, cpu_count

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

MAX_PROCESSES = 1024  # more than a machine has devices; a damaged setting asks for millions
UNASKED_SECONDS, GRACE_SECONDS = (
    3,
    5,
)  # that the others have to end by themselves after one has died, and when asked to
FORWARDED = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
]


class _NoLogs(LogsSpecs):
    """All processes write where this one does."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=nowhere)

    @property
    def root_log_dir(self) -> str:
        return ""


class _Processes(SubprocessContext):
    """Torchrun's processes of one machine. ``store`` is where they look for why one of them failed."""

    def __init__(self, count: int, command: Sequence[str], store: "TCPStore") -> None:
        self.dead: set[int] = set()  # those that failed first
        self.words = prefixed(f"{PREFIX}/{ATTEMPT}", store)
        super().__init__(
            name="sft",
            entrypoint=command[0],
            args=dict.fromkeys(range(count), tuple(command[1:])),
            envs={rank: _variables(rank, count, store.port) for rank in range(count)},
            logs_specs=_NoLogs(),
        )

    def close(self, death_sig: signal.Signals | None = None, timeout: int = GRACE_SECONDS) -> None:
        """Terminate the processes still running, and kill them after ``timeout`` seconds."""
        self.dead = self.dead or set(self._failures)
        for rank, failure in self._failures.items():
            if failure.exitcode < 0 and rank in self.dead:
                self.words.compare_set(FAILURE, "", describe_failure(self.death_of(rank), rank=rank))
        self._let_end(UNASKED_SECONDS)
        if self.is_over():  # all has been said, and connections are being taken down
            self._let_end(GRACE_SECONDS - UNASKED_SECONDS)
        super().close(death_sig, timeout)

    def _let_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            for handler in self.subprocess_handlers.values():
                handler.proc.wait(max(0.0, deadline - time.monotonic()))

    def death_of(self, rank: int) -> ResourceError:
        """Return the error of a training of which process ``rank`` was killed."""
        name = signal.Signals(-self._failures[rank].exitcode).name
        return lost_peer(f"process {rank} of {self.nprocs} was killed by {name}")

    def is_over(self) -> bool:
        """Return whether rank 0 had reported everything before it ended."""
        return bool(self.words.check([OVER]))

    def failure(self) -> str | None:
        """Return the description of the failure that came first, if one was left."""
        return self.words.get(FAILURE).decode() if self.words.check([FAILURE]) else None


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run ``command``, a program and its arguments, in ``count`` processes; return the exit code of all.

    Raises:
        ResourceError: There are fewer CUDA devices.
        UsageError: No machine has as many.
        SftError: The first process was killed before it could say what had happened.
    """
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ResourceError(
            f"{count} processes were requested, but this machine has {torch.cuda.device_count()} CUDA devices",
            hint="start one process for each device",
        )
    if count > MAX_PROCESSES:
        raise UsageError(
            f"{count} processes were requested; one machine takes up to {MAX_PROCESSES:,}",
            hint="lower training.processes",
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    store = tcp_store("127.0.0.1", 0, is_master=True, seconds=5)
    processes = _Processes(count, command, store)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # else it replaces the handlers that pass them on
    forwarded = _forward(processes)
    processes.start()
    for number in list(forwarded):  # came before there was anybody to tell
        signal.raise_signal(number)
    result = None
    while result is None:
        result = processes.wait(timeout=1, period=0.05)
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    return _ending(processes, codes, forwarded)


def _forward(processes: _Processes) -> list[int]:
    """Pass signals on to all processes, which live in sessions of their own; return the list of those that came."""
    came: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        for handler in processes.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    return came


def _ending(processes: _Processes, codes: Mapping[int, int], forwarded: Sequence[int]) -> int:
    """Return the exit code: that of the first process, or of the signal that one of the others was sent.

    Raises:
        SftError: The first process was killed, and not by a signal that was passed on.
    """
    first = codes.get(0, 0)
    if first < 0 and -first not in forwarded:
        found = processes.failure()
        if found and processes.is_over():  # it was ended while it took its connections down
            return exit_code_of(found)
        raise error_of(found) if found and 0 not in processes.dead else processes.death_of(0)
    if first < 0:
        return 128 - first
    signalled = [code for code in codes.values() if code > 128]
    return max(signalled) if first == STOPPED_EXIT_CODE and signalled else first


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    threads = str(max(1, cpu_count() // count))
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "",
    }
