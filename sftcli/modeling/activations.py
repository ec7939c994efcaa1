"""What a model keeps between its forward and backward pass: all, or less of it, by one of the ways of ``Checkpointing``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from sftcli.config.schema.training import Checkpointing
from sftcli.errors import Location, UsageError
from sftcli.modeling.config_values import config_value

_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
_WIDEST = (
    2  # times the hidden size: projections of attention are narrower, those of a feed-forward block are not
)
KEEPS_PRODUCTS = "keeps_products"  # of a module: what its projections give is needed as it was
_CALLED = "_gradient_checkpointing_func"  # of transformers, in each layer

Checkpoint = Callable[..., Any]


def checkpoint_activations(model: PreTrainedModel, how: Checkpointing = Checkpointing.LAYERS) -> None:
    """Keep only the input of each layer for the backward pass, or what ``how`` says, and compute the rest again there.

    It may be called again with another way.

    Raises:
        UsageError: The model's code cannot do that.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(model).__name__} does not support gradient checkpointing",
            hint="leave training.gradient_checkpointing false",
            location=Location(key="training.gradient_checkpointing"),
        )
    kwargs: dict[str, object] = {"use_reentrant": False}
    if how is Checkpointing.SELECTIVE:
        hidden = int(config_value(model, "hidden_size") or 0)
        kwargs["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(_policy, _WIDEST * hidden)
        )
        for module in model.modules():
            setattr(module, KEEPS_PRODUCTS, True)
    newer = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated
    (newer or model.gradient_checkpointing_enable)(kwargs)
    if how is Checkpointing.OFFLOAD:
        for module in model.modules():
            if (checkpoint := vars(module).get(_CALLED)) is not None:
                setattr(module, _CALLED, partial(_on_host, checkpoint))


def ways_down(model: PreTrainedModel, now: Checkpointing, device: torch.device) -> list[Checkpointing]:
    """Return the ways that keep less than ``now``, in their order, as far as ``model`` on ``device`` has them."""
    if not model.supports_gradient_checkpointing:
        return []
    every = list(Checkpointing)
    has_own_memory = device.type == "cuda"  # else the host's is the same
    return [
        how for how in every[every.index(now) + 1 :] if how is not Checkpointing.OFFLOAD or has_own_memory
    ]


def _policy(widest: int, _: object, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:  # noqa: ANN401 - torch's
    """Keep what attention gives, and its projections: the dearest for the memory that they take."""
    name = operation.name() if hasattr(operation, "name") else ""
    if ("attention" in name or "attn" in name) and "backward" not in name:
        return CheckpointPolicy.MUST_SAVE
    if operation in _PRODUCTS and max(args[-1].shape) <= widest:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _on_host(checkpoint: Checkpoint, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Run a layer by ``checkpoint``; what it keeps, its input, goes to the memory of the host until the backward pass."""
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, **kwargs)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    if not tensor.is_cuda:
        return tensor.device, tensor.cpu()
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, kept.copy_(tensor, non_blocking=True)


def _from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, kept = packed
    return kept.to(device, non_blocking=True)
