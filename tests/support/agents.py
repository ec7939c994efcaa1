"""Machines of a job of torchrun that may lose or gain some: each is an agent of torchrun, with a host name of its own where the system allows it.

The meeting point of the agents is kept by the test, as it would be on a machine that does not vanish.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from tests.support.several import REPO, ranks_of

SECONDS = 280  # that a test waits for something on a busy machine


@dataclass
class Machine:
    """An agent and its processes."""

    agent: subprocess.Popen[bytes]
    log: Path

    def ranks(self) -> dict[int, int]:
        """Return the numbers of its processes by rank."""
        return ranks_of(self.agent)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the agent and all of its processes, as what happens to a whole machine."""
        processes = [*self.ranks().values()]
        for pid in (self.agent.pid, *processes):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def lose(self) -> None:
        """Kill all that runs there."""
        self.send(signal.SIGKILL)
        self.agent.wait()


@dataclass
class Job:
    """A job of torchrun with ``--nnodes 1:4``."""

    place: Path
    name: str
    program: Sequence[str]  # arguments of ``sft``
    restarts: int = 3
    machines: list[Machine] = field(default_factory=list)
    store: dist.TCPStore = field(
        default_factory=lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    )

    def add_machine(self) -> Machine:
        """Start an agent."""
        number = len(self.machines)
        log = self.place / f"{self.name}-{number}.log"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", "1",
            "--max-restarts", str(self.restarts), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{self.store.port}", "--rdzv-id", self.name,
            "--rdzv-conf", "is_host=false,last_call_timeout=2", "--local-addr", "127.0.0.1",
            "-m", "--", "sftcli", *self.program,
        ]  # fmt: skip
        own = {
            "PYTHONPATH": str(REPO), "SFT_CACHE_DIR": str(self.place / "cache"), "XDG_STATE_HOME": str(self.place / "state"),
            "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with log.open("wb") as output:
            agent = subprocess.Popen(
                named_host(f"node{number}", command),
                cwd=self.place, env=os.environ | own, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.machines.append(Machine(agent, log))
        return self.machines[-1]

    def machine_of(self, rank: int) -> Machine:
        """Return the machine on which process ``rank`` is now."""
        return next(one for one in self.machines if one.agent.poll() is None and rank in one.ranks())

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that the job does."""
        deadline = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def end(self) -> list[int]:
        """Wait for the end of all machines; return their exit codes."""
        return [one.agent.wait(SECONDS) for one in self.machines]

    def said(self) -> str:
        """Return what all machines have printed."""
        return "\n".join(one.log.read_text(encoding="utf-8", errors="replace") for one in self.machines)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            if machine.agent.poll() is None:
                machine.lose()


def named_host(name: str, command: Sequence[str]) -> list[str]:
    """Return ``command`` under a host name of its own, where the system lets one have it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return [*command]
    renamed = [unshare, "--uts", "--map-root-user", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    can = subprocess.run([*renamed, "true"], check=False, capture_output=True).returncode == 0
    return [*renamed, *command] if can else [*command]
