"""What this machine and installation are: the facts that a bug report needs."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata

import torch

from sftcli import __version__
from sftcli.errors import UsageError
from sftcli.modeling.cache import cache_folder
from sftcli.runtime import choose_device, choose_dtype, dtype_name

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "safetensors",
    "typer",
    "rich",
    "pydantic",
)


def describe_machine() -> dict[str, str]:
    """Return names and values, without host or user names."""
    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "sft": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device} ({name})",
        "precision": dtype_name(choose_dtype("auto", device)),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cache": str(cache_folder()),
    } | {library: metadata.version(library) for library in LIBRARIES}


def check_one_process(environ: Mapping[str, str]) -> None:
    """Refuse to be one of several processes that a launcher has started for one training.

    Raises:
        UsageError: A launcher has set that there is more than one.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        count = environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UsageError(
                f"{count} processes were started ({name}={count}), and a training runs in one",
                hint="start one process: without torchrun, or with srun --ntasks=1",
            )


def facts_of_training(precision: str) -> dict[str, str]:
    """Return what decides, beside everything that a run is made of, whether two trainings are equal bit for bit."""
    device = choose_device()
    return {
        "device": device.type,
        "precision of products": dtype_name(choose_dtype(precision, device)),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "cpu threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


def facts_of_start(command: str) -> dict[str, object]:
    """Return what ``run.json`` says about the start of a run."""
    return {
        "started_at": datetime.now(tz=UTC).isoformat(timespec="microseconds"),
        "command": command,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
