"""Requirements of a command on the machine and its packages, checked before anything slow. Loads torch only to find a device."""

from importlib.metadata import PackageNotFoundError, version

from sftcli.config.auto import value_of
from sftcli.config.schema.adapter import AdapterSettings, Quantize
from sftcli.config.schema.run import Attention, RunSettings, Tracker
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS, TrainingSettings
from sftcli.errors import Location, ResourceError, UsageError
from sftcli.extras import require_package
from sftcli.training.selection import FREEZE, TRAIN

# What transformers looks for; two of them bring a module of the same name.
_FLASH_PACKAGES = {
    Attention.FLASH_2: "flash-attn",
    Attention.FLASH_3: "flash-attn-3",
    Attention.FLASH_4: "flash-attn-4",
}


def check_trackers(settings: RunSettings) -> None:
    """Make sure that the packages of the trackers are installed. A resumed run continues without missing ones.

    Raises:
        UsageError: One is not installed.
    """
    for tracker in settings.trackers:
        package = "mlflow-skinny" if tracker is Tracker.MLFLOW else ""
        require_package(
            tracker, extra="track", needed_by=f"the tracker {tracker}", package=package, key="run.trackers"
        )


def check_machine(settings: Settings) -> None:
    """Make sure that attention, optimizer and adapter of ``settings`` can be used here.

    Raises:
        ResourceError: A 4-bit base needs CUDA, and there is none.
        UsageError: A package is not installed, or attention or optimizer need CUDA, or another precision; or weights are chosen
            beside an adapter.
    """
    _check_attention(settings)
    _check_selection(settings)
    _check_adapter(settings.adapter)
    _check_optimizer(settings.training)


def _check_attention(settings: Settings) -> None:
    asked = settings.model.attention
    fault, way = "", "model.attention=sdpa"
    if asked.needs_cuda and not _has_cuda():
        fault = "a CUDA device, and none is available"
    elif asked.is_flash and settings.training.precision == "fp32":
        fault, way = "numbers of 16 bits, and training.precision is fp32", "training.precision=bf16"
    elif asked.is_flash and not _is_installed(package := _FLASH_PACKAGES[asked]):
        fault, way = (
            f"{package}, which is not installed",
            f"model.attention=sdpa, or install it: pip install {package}",
        )
    if fault:
        raise UsageError(
            f"model.attention={asked} needs {fault}",
            hint=f"set {way}",
            location=Location(key="model.attention"),
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _check_selection(settings: Settings) -> None:
    key = next((key for key in (TRAIN, FREEZE) if value_of(settings, key)), None)
    if key and settings.adapter.is_on:
        raise UsageError(
            f"{key} chooses weights of the whole model, and an adapter is trained, beside which all of them are frozen",
            hint="choose its layers with adapter.target_modules",
            location=Location(key=key),
        )


def _check_adapter(settings: AdapterSettings) -> None:
    if settings.quantize is Quantize.NONE:
        return
    if not _has_cuda():
        raise ResourceError(
            f"adapter.quantize is {settings.quantize}, which needs a CUDA device, and none is available",
            hint="train a plain adapter: --lora; in bfloat16 the base model takes 2 bytes a weight",
        )
    require_package(
        "bitsandbytes",
        extra="qlora",
        needed_by=f"adapter.quantize={settings.quantize}",
        key="adapter.quantize",
    )


def _check_optimizer(settings: TrainingSettings) -> None:
    facts, asked = OPTIMIZERS[settings.optimizer], f"training.optimizer={settings.optimizer}"
    if facts.needs_cuda and not _has_cuda():
        raise UsageError(
            f"{asked} needs a CUDA device, and none is available",
            hint="use adamw_8bit or adafactor",
            location=Location(key="training.optimizer"),
        )
    if facts.needs_bitsandbytes:
        require_package(
            "bitsandbytes",
            extra="8bit",
            needed_by=asked,
            otherwise="take training.optimizer=adafactor",
            key="training.optimizer",
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
