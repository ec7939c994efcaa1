"""Facts about this machine and installation, as a bug report needs them."""

import os
import platform
from contextlib import suppress
from importlib import metadata

import torch

from sftcli.cache import cache_folder
from sftcli.config.schema.training import TrainingSettings
from sftcli.runtime import choose_device, gpu_facts
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


EXTRAS = ("peft", "triton", "bitsandbytes", "liger-kernel", "flash-attn")
# Of what ``gpu_facts`` knows; not the driver, under which the same kernels run.
_OF_EQUALITY = ("gpu", "capability", "cuda")


def describe_machine() -> dict[str, str]:
    """Return names and values, without host or user names."""
    device = choose_device()
    precision = decide_precision("auto", device)
    gpu = gpu_facts(device)
    return {
        "sft": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device} ({gpu.get('gpu', platform.machine())})",
        **{name: value for name, value in gpu.items() if name != "gpu"},
        "precision": f"{precision.name} ({precision.why})",
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cache": str(cache_folder()),
    } | _versions()


def _versions() -> dict[str, str]:
    """Return the versions of the libraries, and of those extras that are installed."""
    found = {library: metadata.version(library) for library in LIBRARIES}
    for extra in EXTRAS:
        with suppress(metadata.PackageNotFoundError):
            found[extra] = metadata.version(extra)
    return found


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
        "context processes": str(settings.context_processes),
    } | {name: value for name, value in gpu_facts(device).items() if name in _OF_EQUALITY}


def facts_of_run(settings: TrainingSettings) -> dict[str, str]:
    """Return all facts of the machine, as ``run.json`` keeps them of the newest start of a run."""
    return facts_of_training(settings) | gpu_facts(choose_device())
