"""A small Kubernetes on this machine: pods of a PyTorchJob are containers that are processes, restarted as the job says."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.agents import named_host
from tests.support.slurm import make_programs

# As in Kubernetes. Sooner than the pods that are left notice it, a worker would meet a master that is about to end, and both of them
# wait until the limits of torchrun and of the program start them again.
BACKOFF_SECONDS = 10.0


@dataclass
class Pod:
    """A pod with one container."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    restart_policy: str
    log: Path
    cwd: Path
    restarts: int = 0
    container: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start the container."""
        with self.log.open("ab") as output:
            self.container = subprocess.Popen(
                named_host(self.name, self.command), cwd=self.cwd, env=dict(self.environ), stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """Kill all processes of the container: those of a torchrun are in sessions of their own."""
        pid = self.container.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        for one in (pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        self.container.wait()


class PyTorchJob:
    """The job of a file, with one process a pod; ``/shared`` is the folder ``shared``, and ``more`` are added to the command."""

    def __init__(self, file: Path, shared: Path, more: Sequence[str], *, port: int) -> None:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert content["kind"] == "PyTorchJob"
        replicas = content["spec"]["pytorchReplicaSpecs"]
        kinds = [
            (kind, number) for kind in ("Master", "Worker") for number in range(replicas[kind]["replicas"])
        ]
        self.limit = content["spec"]["runPolicy"]["backoffLimit"]
        programs = make_programs(shared / f"bin-{port}")
        self.pods = []
        for rank, (kind, number) in enumerate(kinds):
            spec = replicas[kind]
            (container,) = spec["template"]["spec"]["containers"]
            self.pods.append(
                Pod(
                    name=f"{content['metadata']['name']}-{kind.lower()}-{number}",
                    command=[_at(shared, word) for word in (*container["command"], *more)],
                    environ=programs
                    | {one["name"]: _at(shared, one["value"]) for one in container["env"]}
                    | _of_operator(rank, len(kinds), port)
                    | {"XDG_STATE_HOME": str(shared / "state")},
                    restart_policy=spec["restartPolicy"],
                    log=shared / f"{kind.lower()}-{number}-{port}.log",
                    cwd=shared,
                )
            )

    def __enter__(self) -> "PyTorchJob":
        for pod in self.pods:
            pod.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            if pod.container.poll() is None:
                pod.kill()

    def keep(self) -> bool:
        """Do what the kubelets do, once; return whether all pods have succeeded.

        Raises:
            AssertionError: A pod has failed for good.
        """
        for pod in self.pods:
            if pod.container.poll() not in (None, 0):
                assert pod.restart_policy == "OnFailure"
                assert pod.restarts < self.limit, self.said()
                pod.restarts += 1
                time.sleep(BACKOFF_SECONDS)
                pod.start()
        return all(pod.container.poll() == 0 for pod in self.pods)

    def said(self) -> str:
        """Return what all pods have printed."""
        return "\n".join(pod.log.read_text(encoding="utf-8", errors="replace") for pod in self.pods)


def run_of_skypilot(file: Path, shared: Path) -> str:
    """Return the commands that each machine of a SkyPilot task runs; ``/shared`` is the folder ``shared``."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert "/shared" in content["file_mounts"]
    return _at(shared, content["run"])


def _of_operator(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables of Kubeflow's operator for one process a pod: the Service of the master is this machine."""
    names = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NNODES": str(size), "NODE_RANK": str(rank), "NPROC_PER_NODE": "1",
    }  # fmt: skip
    own = {"WORLD_SIZE": str(size), "RANK": str(rank), "PYTHONUNBUFFERED": "1"}
    return own | {f"PET_{name}": value for name, value in names.items()}


def _at(shared: Path, text: str) -> str:
    return re.sub(r"/shared\b", str(shared), text)
