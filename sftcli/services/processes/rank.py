"""The rank of this process among those a launcher started for one command. Imports no torch: used on every start."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sftcli.environment import TORCHRUN
from sftcli.errors import UsageError

ATTEMPT = "0"  # of processes that are started once
_FIRST_HOST = re.compile(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of ``size`` processes, of which ``local_size`` are on this machine; all meet at ``address`` and ``port``."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    is_hosted: bool  # the launcher keeps the meeting point; else the first process does
    attempt: (
        str | None
    )  # name of what they do together; None where the launcher may start them again at the same store
    threads: int  # that this process may use so that all on this machine have their share


def cpu_count() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Read what torchrun, Slurm's ``srun`` or a launcher with their variables has set; None for a single process.

    Raises:
        UsageError: There are several, and a variable that tells them apart is missing or no number.
    """
    if _number(environ, "WORLD_SIZE", 1) > 1:
        local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "WORLD_SIZE"))
        return Place(
            rank=_number(environ, "RANK"),
            size=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK", _number(environ, "RANK")),
            local_size=local_size,
            address=_text(environ, "MASTER_ADDR"),
            port=_number(environ, "MASTER_PORT"),
            is_hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=None if environ.get(TORCHRUN) else ATTEMPT,
            threads=max(1, cpu_count() // local_size),
        )
    if environ.get(TORCHRUN):  # which has come down to one process, perhaps in a step of several tasks
        return None
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm_place(environ)
    return None


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher decides how many processes there are: torchrun may have come down to a single one."""
    return bool(environ.get(TORCHRUN)) or find_place(environ) is not None


def _slurm_place(environ: Mapping[str, str]) -> Place:
    """Return the place of a task of ``srun``; all find the same port from the numbers of job and step."""
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID", 0)
    per_node = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = int(per_node[0]) if per_node else 1
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=local_size,
        address=environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
        port=_number(environ, "MASTER_PORT", 20000 + (7 * job + step) % 20000),
        is_hosted=False,
        attempt=ATTEMPT,
        threads=_number(environ, "SLURM_CPUS_PER_TASK", max(1, cpu_count() // local_size)),
    )


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm list of nodes: ``gpu[03-05,9]-ib,cpu1`` begins with ``gpu03-ib``."""
    found = _FIRST_HOST.match(nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UsageError(
            f"several processes were started for one command, but {name} is not set",
            hint="start them with sft train --processes N, torchrun or srun",
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    text = _text(environ, name)
    if not text.isdecimal():
        raise UsageError(f"the variable {name} is {text!r} and must be a whole number")
    return int(text)
