"""Optimizers with less state than AdamW's two float32 moments, from libraries that keep them."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch

from sftcli.config.training_settings import OptimizerName, TrainingSettings
from sftcli.errors import Location, UsageError
from sftcli.extras import install_command

_LOCATION = Location(key="training.optimizer")


def make_lean_optimizer(
    groups: Sequence[dict[str, object]], settings: TrainingSettings, *, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer that ``settings`` name, which is not AdamW.

    Adafactor keeps row and column means of the squared gradients and no first moment (Shazeer and Stern 2018); its
    learning rate is absolute, as AdamW's is. The 8-bit ones keep AdamW's moments in blocks of 8-bit numbers.

    Raises:
        UsageError: A package or a device is missing.
    """
    if settings.optimizer is OptimizerName.ADAFACTOR:
        from transformers.optimization import Adafactor

        return Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
        )
    is_paged = settings.optimizer is OptimizerName.PAGED_ADAMW_8BIT
    if is_paged and device.type != "cuda":
        raise UsageError(
            f"training.optimizer=paged_adamw_8bit needs a CUDA device; this is {device}",
            hint="take adamw_8bit or adafactor",
            location=_LOCATION,
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"training.optimizer={settings.optimizer} needs bitsandbytes, which is not installed",
            hint=f"install it: {install_command('8bit')}, or take training.optimizer=adafactor",
            location=_LOCATION,
        )
    optimizer: torch.optim.Optimizer = cast("Any", import_module("bitsandbytes.optim")).AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        optim_bits=8,
        is_paged=is_paged,
    )
    return optimizer
