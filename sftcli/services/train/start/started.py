"""What a run says about its start."""

import platform
from datetime import UTC, datetime
from importlib import metadata

import torch

from sftcli.services.machine.facts import LIBRARIES
from sftcli.services.runs.record import RunRecord
from sftcli.version import __version__


def started(command: str) -> RunRecord:
    """Return the record of a run that ``command`` starts now."""
    return RunRecord(
        started_at=datetime.now(tz=UTC).isoformat(timespec="microseconds"),
        command=command,
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in LIBRARIES if name != "torch"},
    )
