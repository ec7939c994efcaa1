"""A small Slurm on this machine: runs a batch script with ``srun`` and ``scontrol`` that are stand-ins, and takes jobs back into the queue."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.several import REPO

_DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", flags=re.MULTILINE)
_PROGRAMS = {
    "sft": f'exec {sys.executable} -m sftcli "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": f'exec {sys.executable} -m tests.support.srun "$@"',
    # "show hostnames" of the list that is given to jobs here, and "requeue"
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$REQUEUED_FILE"',
}


def make_programs(folder: Path) -> dict[str, str]:
    """Put the programs into ``folder``; return an environment that finds them, and this source tree."""
    folder.mkdir()
    for name, text in _PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


class SlurmJob:
    """A job of two nodes with a task each, as ``sbatch --nodes=2 --ntasks-per-node=1 SCRIPT ARGUMENT...`` makes it."""

    def __init__(self, script: Path, arguments: list[str], *, cwd: Path, number: int) -> None:
        self.command = [str(script), *arguments]
        self.directives = dict(_DIRECTIVE.findall(script.read_text(encoding="utf-8")))
        self.cwd, self.restarts = cwd, 0
        folder = cwd / f"job-{number}"
        self._step, self._requeued = folder / "step", folder / "requeued"
        self.log = folder / "log"
        folder.mkdir()
        self._environ = make_programs(folder / "bin") | {
            "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1",
            "STEP_FILE": str(self._step), "REQUEUED_FILE": str(self._requeued), "SFT_CACHE_DIR": str(cwd / "cache"),
            "XDG_STATE_HOME": str(cwd / "state"),
        }  # fmt: skip

    def start(self) -> None:
        """Run the batch script, for the first time or again."""
        restarted = {"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}
        self._step.unlink(missing_ok=True)
        with self.log.open("ab") as output:  # --open-mode=append
            self._batch = subprocess.Popen(
                self.command, cwd=self.cwd, env=self._environ | restarted, stdout=output, stderr=output
            )

    def run_out_of_time(self) -> None:
        """Do what Slurm does some time before the limit."""
        to, _, name = self.directives["signal"].partition("@")[0].partition(":")
        assert to == "B"  # to the batch script alone
        self._batch.send_signal(signal.Signals[f"SIG{name}"])

    def tasks(self) -> list[int]:
        """Return the processes of the step, by task; none before it has begun."""
        return json.loads(self._step.read_text(encoding="utf-8")) if self._step.exists() else []

    def lose_node(self, node: int) -> None:
        """Kill all that runs on a node."""
        for pid in with_children(self.tasks()[node]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def node_that_listens(self, port: int) -> int:
        """Return the node of the task that listens at ``port``: nodes share one machine here, so it need not be the first."""
        return next(node for node, pid in enumerate(self.tasks()) if _listens(pid, port))

    def wait(self, seconds: float) -> tuple[int, bool]:
        """Return the exit code of the batch script, and whether the job goes back into the queue."""
        code, number = self._batch.wait(seconds), self._environ["SLURM_JOB_ID"]
        is_requeued = self._requeued.exists()
        if is_requeued:
            assert "requeue" in self.directives
            assert self._requeued.read_text(encoding="utf-8") == f"requeue {number}\n"
            self._requeued.unlink()
            self.restarts += 1
        return code, is_requeued

    def is_running(self) -> bool:
        """Return whether the batch script has not ended."""
        return self._batch.poll() is None

    def end(self) -> None:
        """Leave nothing behind."""
        if self.is_running():
            for pid in with_children(self._batch.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._batch.wait()


def _listens(pid: int, port: int) -> bool:
    sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            address, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and address.endswith(f":{port:04X}"):  # LISTEN
                sockets.add(f"socket:[{inode}]")
    return any(str(file.readlink()) in sockets for file in Path(f"/proc/{pid}/fd").iterdir())


def with_children(pid: int) -> list[int]:
    """Return ``pid`` and all that it has started, whatever sessions they are in."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = (
        [int(child) for child in children.read_text(encoding="ascii").split()] if children.exists() else []
    )
    return [pid, *(one for child in found for one in with_children(child))]
