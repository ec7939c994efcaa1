"""Weights, optimizer and learning rate.

Master weights, optimizer moments and gradient sums are float32 whatever the products run in: at a learning rate of 1e-5
an update is smaller than the spacing of bfloat16 numbers and would be rounded away.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from sftcli.config.training_settings import Schedule, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_embeddings(model: "PreTrainedModel") -> None:
    """Leave token embeddings and output head as they are.

    AdamW scales every gradient to about the same step, also the tiny ones that the softmax sends to each token that a
    batch does not use: over a short run on few rows they add up and push rare tokens down.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[no-untyped-call]
        if layer is not None:
            layer.requires_grad_(False)


class MasterWeights:
    """Float32 masters of the trainable parameters of a model that computes in ``compute_dtype``.

    With ``compute_dtype`` float32 the masters are the parameters themselves. Otherwise each parameter becomes a rounded
    copy, its gradient is added to the master's float32 gradient as soon as backward has made it, and ``publish`` rounds
    the updated masters into the copies.
    """

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                if parameter.is_floating_point():  # 4-bit weights are packed in bytes
                    parameter.data = parameter.data.to(compute_dtype)
            elif compute_dtype == torch.float32:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                self.masters[name] = self._split(parameter)

    def _split(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        master = torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        parameter.data = parameter.data.to(self.compute_dtype)

        def collect(copy: torch.Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            if gradient is None:
                return
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient

        parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        self._copies.append((parameter, master))
        return master

    def publish(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        if self._copies:
            copies, masters = zip(*self._copies, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(list(copies), list(masters))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every weight of the model by name: the masters, and what is frozen as it is."""
        return {
            name: self.masters.get(name, weight).detach() for name, weight in self.model.named_parameters()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters to ``tensors``, by name, and publish them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
        self.publish()


def make_optimizer(
    masters: Mapping[str, torch.nn.Parameter], settings: TrainingSettings
) -> torch.optim.AdamW:
    """Return AdamW over ``masters``; weight decay applies to matrices, not to gains and biases."""
    decayed = [master for master in masters.values() if master.ndim >= 2]
    undecayed = [master for master in masters.values() if master.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of the step after ``step`` finished ones: linear warm-up, then the schedule.

    Cosine is ``(1 + cos(pi * p)) / 2`` with ``p`` from 0 after warm-up to 1 at ``max_steps`` (Loshchilov and Hutter 2017,
    SGDR, one cycle, ending at 0).
    """
    warmup = settings.num_warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    match settings.schedule:
        case Schedule.COSINE:
            return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        case Schedule.LINEAR:
            return settings.learning_rate * (1 - progress)
        case Schedule.CONSTANT:
            return settings.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_grad_norm(masters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to ``max_norm`` where their global norm exceeds it; return the norm before."""
    return torch.nn.utils.clip_grad_norm_(masters, max_norm)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, masters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as ``moment/parameter name`` -> tensor; empty before the first step."""
    return {
        f"{moment}/{name}": optimizer.state[master][moment]
        for name, master in masters.items()
        for moment in MOMENTS
        if master in optimizer.state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    masters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Set the optimizer's state from what ``optimizer_tensors`` returned."""
    for name, master in masters.items():
        if f"step/{name}" in tensors:
            state = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
            # The step counter of fused AdamW lives beside its parameter; safetensors gives it back on the CPU.
            optimizer.state[master] = {key: value.to(master.device) for key, value in state.items()}
