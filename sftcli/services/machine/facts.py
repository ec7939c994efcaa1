"""Facts about this machine and installation, as a bug report needs them."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata

import torch

from sftcli.cache import cache_folder
from sftcli.config.schema.training import TrainingSettings
from sftcli.runtime import choose_device
from sftcli.services.machine.precision import decide_precision
from sftcli.version import __version__

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
    precision = decide_precision("auto", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "sft": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device} ({name})",
        "precision": f"{precision.name} ({precision.why})",
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cache": str(cache_folder()),
    } | {library: metadata.version(library) for library in LIBRARIES}


def facts_of_training(settings: TrainingSettings) -> dict[str, str]:
    """Return the facts of the machine that decide whether two trainings are equal bit for bit."""
    device = choose_device()
    return {
        "device": device.type,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "cpu threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "processes": str(settings.processes),
    }


def facts_of_start(command: str) -> dict[str, object]:
    """Return what ``run.json`` says about the start of a run."""
    return {
        "started_at": datetime.now(tz=UTC).isoformat(timespec="microseconds"),
        "command": command,
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in LIBRARIES if name != "torch"},
    }
