"""Optimizers: how each is made, its state as tensors, and the norm of its gradients."""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Any, assert_never, cast

import torch

from sftcli.config.schema.training import OptimizerName, TrainingSettings
from sftcli.errors import MismatchError
from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.optim.adafactor import Adafactor
from sftcli.training.optim.lean_adamw import LeanAdamW
from sftcli.training.optim.muon import MuonWithAdamW
from sftcli.training.weights.placement import placed_as


def make_optimizer(
    masters: Mapping[str, torch.nn.Parameter],
    settings: TrainingSettings,
    *,
    embeddings: Collection[str] = (),
    remainders: Mapping[str, torch.Tensor] | None = None,
    shard_group: ShardGroup | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of ``masters``; weight decay applies to matrices, not to gains and biases.

    ``embeddings`` are the names of token embeddings and output head, whose rows are vectors of their own. ``remainders`` are the
    lower halves of masters that are split, by name. ``shard_group`` are the processes among which masters are shared out.
    Whether the package and the device that it needs are there is asked before a run begins, by ``check_machine``.
    """
    decayed = [master for master in masters.values() if master.ndim >= 2]
    undecayed = [master for master in masters.values() if master.ndim < 2]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match settings.optimizer:
        case OptimizerName.ADAMW:
            return torch.optim.AdamW(
                groups,
                lr=settings.peak_learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                fused=True,
            )
        case OptimizerName.MUON:
            return _muon(masters, embeddings, settings, shard_group)
        case OptimizerName.ADAFACTOR:
            # Its learning rate is absolute, as AdamW's is.
            return Adafactor(groups, learning_rate=settings.peak_learning_rate, shard_group=shard_group)
        case OptimizerName.ADAMW_LEAN:
            return LeanAdamW(
                groups,
                remainders={masters[name]: rest for name, rest in (remainders or {}).items()},
                learning_rate=settings.peak_learning_rate,
                betas=(settings.beta1, settings.beta2),
                epsilon=settings.epsilon,
                seed=settings.seed,
            )
        case OptimizerName.ADAMW_8BIT:
            return _adamw_8bit(groups, settings, is_paged=False)
        case OptimizerName.PAGED_ADAMW_8BIT:
            return _adamw_8bit(groups, settings, is_paged=True)
        case _:
            assert_never(settings.optimizer)


def _muon(
    masters: Mapping[str, torch.nn.Parameter],
    embeddings: Collection[str],
    settings: TrainingSettings,
    shard_group: ShardGroup | None,
) -> torch.optim.Optimizer:
    """Updates of matrices whose singular values are all about one (Jordan 2024); experts in one tensor stay with AdamW."""
    matrices = {name for name, master in masters.items() if master.ndim == 2} - {*embeddings}
    others = {name: master for name, master in masters.items() if name not in matrices}
    groups = (
        {
            "params": [masters[name] for name in masters if name in matrices],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [master for master in others.values() if master.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [master for master in others.values() if master.ndim < 2], "weight_decay": 0.0},
    )
    return MuonWithAdamW(
        [group for group in groups[:1] if group["params"]],
        [group for group in groups[1:] if group["params"]],
        learning_rate=settings.peak_learning_rate,
        betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon,
        shard_group=shard_group,
    )


def _adamw_8bit(
    groups: Sequence[dict[str, object]], settings: TrainingSettings, *, is_paged: bool
) -> torch.optim.Optimizer:
    """AdamW whose moments are kept in blocks of 8-bit numbers."""
    optimizer: torch.optim.Optimizer = cast("Any", import_module("bitsandbytes.optim")).AdamW(
        groups,
        lr=settings.peak_learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        optim_bits=8,
        is_paged=is_paged,
    )
    return optimizer


def gradient_norm(masters: Collection[torch.nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients together, a scalar; of sharded masters it is sharded too."""
    return torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])


def clip_gradients(masters: Collection[torch.nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scale the gradients, whose ``norm`` is as ``gradient_norm`` gave it, down to ``max_norm``."""
    torch.nn.utils.clip_grads_with_norm_(masters, max_norm, norm)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, masters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as ``moment/parameter name`` -> tensor; empty before the first step.

    Whole numbers become int64 scalars.
    """
    return {
        f"{moment}/{name}": value
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=torch.int64)
        for name, master in masters.items()
        for moment, value in optimizer.state.get(master, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    masters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Set the optimizer's state from what ``optimizer_tensors`` returned.

    Raises:
        MismatchError: A tensor has another shape than this version gives it.
    """
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        states.setdefault(name, {})[moment] = value
    for name, state in states.items():
        optimizer.state[masters[name]] = _restored(optimizer, name, masters[name], state)


def _restored(
    optimizer: torch.optim.Optimizer, name: str, master: torch.Tensor, stored: Mapping[str, torch.Tensor]
) -> dict[str, object]:
    make_state = getattr(
        optimizer, "first_state", None
    )  # those whose state is not all in the shape of weights
    if make_state is None:
        return {moment: _placed(optimizer, master, value) for moment, value in stored.items()}
    state: dict[str, object] = make_state(master)
    for moment, like in state.items():
        value = stored[moment]
        if isinstance(like, torch.Tensor) and value.shape != like.shape:
            raise MismatchError(
                f"the checkpoint has {moment} of {name} in the shape {tuple(value.shape)}, not {tuple(like.shape)}",
                hint="resume with the version that began the run, or train on from it in a new one: sft train --model CHECKPOINT",
            )
        state[moment] = placed_as(value, like) if isinstance(like, torch.Tensor) else int(value)
    return state


def _placed(optimizer: torch.optim.Optimizer, master: torch.Tensor, value: torch.Tensor) -> object:
    if value.ndim == 0 and value.dtype == torch.int64:
        return int(value)
    make_buffer = getattr(
        optimizer, "get_state_buffer", None
    )  # bitsandbytes: in paged memory where asked for
    if make_buffer is not None and value.shape == master.shape:
        return make_buffer(master, dtype=value.dtype).copy_(value)
    # The step counter of fused AdamW lives beside its parameter; safetensors gives it back on the CPU.
    return placed_as(value, master) if value.shape == master.shape else value.to(master.device)
