"""A small ``srun``: starts the tasks of a step on nodes that are names of this machine, passes signals on, and ends with the highest status.

``python -m tests.support.srun [--no-kill] --kill-on-bad-exit=N --wait=N PROGRAM ARGUMENT...`` with the variables of ``Slurm`` in ``slurm.py``.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from types import FrameType

from tests.support.agents import named_host

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def start_tasks(command: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start each task with what Slurm tells it."""
    nodes, per_node = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for rank in range(nodes * per_node):
        node, local = divmod(rank, per_node)
        variables = {
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(nodes * per_node), "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        }  # fmt: skip
        tasks.append(subprocess.Popen(named_host(f"127.0.0.{node + 1}", command), env=os.environ | variables))
    return tasks


def main() -> int:
    options = list(takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
    given = dict(word.removeprefix("--").partition("=")[::2] for word in options)
    ends_all, longest = given["kill-on-bad-exit"] == "1", float(given["wait"]) or math.inf
    tasks = start_tasks(sys.argv[1 + len(options) :])
    Path(os.environ["STEP_FILE"]).write_text(json.dumps([task.pid for task in tasks]), encoding="utf-8")

    def forward(number: int, _frame: FrameType | None) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    deadline = math.inf
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.returncode is not None]
        deadline = min(deadline, time.monotonic() + longest) if ended else deadline
        if (ends_all and any(ended)) or time.monotonic() > deadline:
            forward(signal.SIGKILL, None)
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
