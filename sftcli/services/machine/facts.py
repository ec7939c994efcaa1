"""Facts about this machine and installation, as a bug report needs them."""

import os
import platform
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
