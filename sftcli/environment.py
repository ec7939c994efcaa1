"""Environment variables: those that libraries read once and that are set before torch is imported, and what others tell."""

import os
from collections.abc import Mapping

_SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_SERVICE_HOST")


def set_defaults() -> None:
    """Set what makes training on a CPU faster. The user's own values stay."""
    # Threads that wait for each other must sleep, not spin: on a machine that does other work too, spinning made training
    # two times slower, and without other work it gains nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def is_scheduled(environ: Mapping[str, str]) -> bool:
    """Tell whether a scheduler of a cluster started this process, and may end it."""
    return any(name in environ for name in _SCHEDULER_VARIABLES)
