"""Weights, optimizer and learning rate.

Master weights, optimizer moments and gradient sums are float32 whatever the products run in: at a learning rate of 1e-5
an update is smaller than the spacing of bfloat16 numbers and would be rounded away.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch

from sftcli.config.training_settings import OptimizerName, Schedule, TrainingSettings
from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError
from sftcli.runtime import is_finite
from sftcli.training.distributed.group import Group
from sftcli.training.loss import BatchLoss
from sftcli.training.optim.lean_optimizers import make_lean_optimizer

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

    are_shared_out = False  # whether this process holds a part of them only
    keeps_frozen = True  # whether snapshots hold what does not train

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._frozen: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                if parameter.is_floating_point():  # 4-bit weights are packed in bytes
                    self._round_frozen(name, parameter, keep=self.keeps_frozen)
            elif compute_dtype == torch.float32:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                self.masters[name] = self._split(parameter)

    def _round_frozen(self, name: str, parameter: torch.nn.Parameter, *, keep: bool) -> None:
        """Round a weight that does not train. Where that loses something it is kept as it was: what is written is exact."""
        exact, parameter.data = parameter.data, parameter.data.to(self.compute_dtype)
        if keep and not _is_exact(parameter.data, exact):
            half = exact.half()
            self._frozen[name] = (half if _is_exact(half, exact) else exact).cpu()

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

    def passes(self, batches: Iterable[Batch], group: Group) -> Iterator[tuple[Batch, float]]:
        """Yield this process's share of ``batches``, each with the weight of its loss in the sum."""
        for batch in islice(batches, group.rank, None, group.size):
            yield batch, 1.0

    def gathered(self, batch_loss: BatchLoss) -> BatchLoss:
        """Return ``batch_loss`` with every weight that it reads whole."""
        return batch_loss

    def gather(self, nll_sum: torch.Tensor, group: Group) -> torch.Tensor:
        """Return the sum of ``nll_sum`` over the processes, after the gradients of the masters are those of all."""
        return group.gather(nll_sum, self.masters.values())

    def publish(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        if self._copies:
            copies, masters = zip(*self._copies, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(list(copies), list(masters))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every weight of the model by name: the masters, and what is frozen and the buffers as they were loaded."""
        written = self._frozen | self.masters
        weights = {name: written.get(name, weight).detach() for name, weight in self.model.named_parameters()}
        return weights | stored_buffers(self.model)

    def gathered_state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole ``tensors`` of the optimizer's state in the process that writes. All processes must ask."""
        return dict(tensors)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters and buffers to ``tensors``, by name, and publish them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(placed_as(tensors[name], master))
            for name, buffer in stored_buffers(self.model).items():
                if name in tensors:
                    buffer.copy_(tensors[name])
        self.publish()

    def refuse_nonfinite(self, step: int) -> None:
        """Raise where a master of step ``step``, which is about to be saved, is not finite.

        Raises:
            DivergedError: One is not.
        """
        for name, master in self.masters.items():
            if not is_finite(master):
                raise DivergedError(
                    f"step {step} is not saved: {name} holds numbers that are not finite",
                    hint="earlier checkpoints are intact; lower training.learning_rate",
                )


def stored_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that files of ``model`` hold beside its parameters, such as the routing bias of experts."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}


def _is_exact(rounded: torch.Tensor, exact: torch.Tensor) -> bool:
    return torch.equal(rounded.to(exact.dtype), exact)


def make_optimizer(
    masters: Mapping[str, torch.nn.Parameter], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Return the optimizer of ``masters``; weight decay applies to matrices, not to gains and biases.

    Raises:
        UsageError: The optimizer that the settings name needs a package or a device that is not here.
    """
    decayed = [master for master in masters.values() if master.ndim >= 2]
    undecayed = [master for master in masters.values() if master.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer is not OptimizerName.ADAMW:
        return make_lean_optimizer(groups, settings)
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of the step after ``step`` finished ones: linear warm-up, then the schedule.

    It falls from the peak to ``min_learning_rate_fraction`` of it.
    """
    warmup = settings.num_warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    height, floor = _height(step, settings), settings.min_learning_rate_fraction
    return settings.learning_rate * (floor + (1 - floor) * height)


def _height(step: int, settings: TrainingSettings) -> float:
    """Return where the schedule stands between 1 after warm-up and 0 at ``max_steps``.

    Cosine is ``(1 + cos(pi * p)) / 2`` with ``p`` from 0 after warm-up to 1 at the end (Loshchilov and Hutter 2017, SGDR,
    one cycle). WSD falls as ``1 - sqrt(q)`` with ``q`` from 0 to 1 over the last steps (Haegele et al. 2024, Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations).
    """
    progress = (step - settings.num_warmup_steps) / max(1, settings.max_steps - settings.num_warmup_steps)
    match settings.schedule:
        case Schedule.COSINE:
            return (1 + math.cos(math.pi * progress)) / 2
        case Schedule.LINEAR:
            return 1 - progress
        case Schedule.CONSTANT:
            return 1.0
        case Schedule.WSD:
            steps = min(
                max(1, round(settings.max_steps * settings.decay_fraction)),
                max(1, settings.max_steps - settings.num_warmup_steps),
            )
            return 1 - math.sqrt(max(0, step - (settings.max_steps - steps)) / steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_grad_norm(masters: Collection[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to ``max_norm`` where their global norm exceeds it; return the norm before."""
    norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
    total = whole(norm)
    if total > max_norm:  # else there is no need to go over all of them again
        torch.nn.utils.clip_grads_with_norm_(masters, max_norm, norm)
    return total


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of ``tensor``. Where each process holds a part of it, all of them must ask."""
    # Importing DTensor to ask for it costs a start-up; no other tensor has this method.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast("torch.Tensor", gather())


def placed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` on the device of ``like``; where ``like`` is shared out, this process's part of it."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return value.to(like.device)
    with torch.no_grad():
        placed = torch.zeros_like(like)
        # Every process has the whole value, so none has to send it; the last ones may have no part of a small one.
        for part in value.chunk(mesh.size())[mesh.get_local_rank() :][:1]:
            local_part(placed).copy_(part)
    return placed


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of ``tensor``, which is shared out, that this process holds."""
    return cast("torch.distributed.tensor.DTensor", tensor).to_local()


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
    """Set the optimizer's state from what ``optimizer_tensors`` returned."""
    states: dict[str, dict[str, object]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        states.setdefault(name, {})[moment] = _placed(optimizer, masters[name], value)
    for name, state in states.items():
        optimizer.state[masters[name]] = state


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
