"""Optimizers with less state than AdamW's two float32 moments, from libraries that keep them."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import torch

from sftcli.config.training_settings import OptimizerName, TrainingSettings


def make_lean_optimizer(
    groups: Sequence[dict[str, object]], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Return the optimizer that ``settings`` name, which is not AdamW.

    Adafactor keeps row and column means of the squared gradients and no first moment (Shazeer and Stern 2018); its
    learning rate is absolute, as AdamW's is. The 8-bit ones keep AdamW's moments in blocks of 8-bit numbers; whether package
    and device are there is asked before a run begins, by ``check_machine``.
    """
    if settings.optimizer is OptimizerName.ADAFACTOR:
        from transformers.optimization import Adafactor

        return Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
        )
    optimizer: torch.optim.Optimizer = cast("Any", import_module("bitsandbytes.optim")).AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        optim_bits=8,
        is_paged=settings.optimizer is OptimizerName.PAGED_ADAMW_8BIT,
    )
    return optimizer
