"""Sharded weights: each process keeps a shard, and gathers a full layer when it computes.

The engine is ``torch.distributed.fsdp.fully_shard``. Every decoder layer is gathered and dropped by itself; embeddings,
last norm and head are the root, which stays gathered from the forward pass to the end of the backward pass.
Groups of processes with consecutive ranks may hold a replica each: weights travel inside a group alone, and once a step the
processes that hold the same shard sum its gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from types import MethodType
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError
from sftcli.runtime import is_finite
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.distributed.traffic import Weight
from sftcli.training.loss import BatchLoss
from sftcli.training.weights.masters import MasterWeights, refuse_other_adapter, stored_buffers
from sftcli.training.weights.owners import gathered, owners_of, with_held
from sftcli.training.weights.parts import Outside, WeightsElsewhere, read_shards, take_out
from sftcli.training.weights.placement import local_part
from sftcli.training.weights.rejoining import PassLog

_LOSS = "batch_loss_of_all_weights"


class ShardedWeights(MasterWeights):
    """Float32 masters, sharded along the first dimension.

    There are no copies of lower precision beside them: what is gathered is rounded to ``compute_dtype`` on the way, and
    gradients are summed and exchanged in float32. What is frozen is shared out as well, in ``compute_dtype``.

    Args:
        model: The same whole model in every process; on the CPU where the device has no room for it. It is changed.
        compute_dtype: Of matrix products.
        group: The processes; more than one.
        shards: How many of them hold a replica together, at least two; they divide the size of ``group``.
        device: Where each keeps its part.
        exchange_each_micro_batch: Exchange gradients after every pass, not once per step: costs traffic, and saves the memory of
            a float32 gradient of the whole model between the micro-batches of a step.
        file_name: Gives the name in checkpoints of what trains, where they hold nothing else (an adapter).
        files: Those weights of ``model`` that are in its files still: each process reads its part of them.
    """

    is_sharded = True
    collects_at_once = True  # by what shares the weights out

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        compute_dtype: torch.dtype,
        group: Group,
        shards: int,
        device: torch.device,
        exchange_each_micro_batch: bool = False,
        file_name: Callable[[str], str] | None = None,
        files: WeightsElsewhere | None = None,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.remainders = {}
        self._trains_adapter = file_name is not None
        self.saves_parts = file_name is None  # of an adapter, which is small, the first process has all
        self._frozen: dict[str, torch.Tensor] = {}
        keeps = file_name is None and group.is_writer
        for name, parameter in model.named_parameters():
            if files is not None and parameter in files.tensors:
                continue
            if parameter.requires_grad:
                self._require_range(name, parameter.data)
                parameter.data = parameter.data.float()
            else:
                self._round_frozen(name, parameter, keep=keeps)
        outside: Mapping[str, Outside] = {}
        if files is not None:
            outside = take_out(
                model, files, compute_dtype=compute_dtype, group=group, writes_frozen=file_name is None
            )
        self.group = group
        self.exchange_each_micro_batch = exchange_each_micro_batch
        mesh = _mesh(group.size, shards, device)
        self._root = _shard(model, compute_dtype, mesh, device)
        self.shard_group = ShardGroup(group=group, processes=mesh.get_group(mesh.ndim - 1))
        self._log = PassLog(
            self._root,
            shards=self.shard_group.processes,
            replicas=mesh.get_group(0) if mesh.ndim > 1 else None,
            device=device,
        )
        self._left: list[
            tuple[bool, bool]
        ] = []  # of the passes of a step: whether they exchange, and sum over replicas
        self.shards = shards
        read_shards(model, outside, device)
        self._frozen |= {name: one.exact() for name, one in outside.items() if keeps and one.is_rounded}
        named = dict(model.named_parameters())
        self.masters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        weights = (Weight(shape=tuple(master.shape)) for master in self.masters.values())
        self._scattered_bytes = 4 * sum(weight.padded(shards) for weight in weights)
        self._summed_bytes = self._scattered_bytes // shards if shards < group.size else 0
        buffers = stored_buffers(model)
        self.has_buffers = bool(buffers)
        kept = named | buffers if file_name is None else self.masters
        self._stored = {(file_name or str)(name): tensor for name, tensor in kept.items()}
        self._trained = {(file_name or str)(name): parameter for name, parameter in self.masters.items()}

    def micro_batches(self, batches: Iterable[Batch], group: Group) -> Iterator[tuple[Batch, float]]:
        """Yield the same number of batches in every process: one that runs short computes another's with weight 0.

        Each pass gathers the weights, and all processes must take part in that.
        """
        self._root.reshard()  # a held-out pass leaves it gathered, and each step exchanges the same
        rounds = list(group.batches(batches))
        self._left = [(self.exchange_each_micro_batch, False)] * (len(rounds) - 1) + [(True, True)]
        for batch, is_own in rounds:
            exchanges, sums = self._left[0]
            self._begin_pass(exchanges=exchanges, sums=sums)
            yield batch, float(is_own)
            self._log.end(exchanges=exchanges)
            self._left.pop(0)
            group.exchanged_bytes += self._scattered_bytes if exchanges else 0
            group.exchanged_bytes += self._summed_bytes if sums else 0

    def _begin_pass(self, *, exchanges: bool, sums: bool) -> None:
        self._log.begin()
        self._root.set_requires_gradient_sync(exchanges)  # else each process keeps its sums whole
        self._root.set_requires_all_reduce(sums)  # replicas wait for the sums of a step

    def rehearse(self, take: Callable[[], None]) -> bool:
        """Note what a pass exchanges while ``take`` takes one, in all processes; return whether one that breaks off can be ended."""
        self._root.reshard()
        self._begin_pass(exchanges=True, sums=True)
        take()
        self._log.keep()
        return self._log.is_known

    def can_give_up(self, group: Group) -> bool:  # noqa: ARG002 - it is this one's
        """Return whether this process can end a pass that broke off, and is inside one."""
        return bool(self._left) and self._log.is_known

    def give_up_exchange(self) -> None:
        """Give the others zeros for what the passes of a step that broke off here had still to exchange."""
        if not self._left:
            return
        self._log.reset()
        for exchanges, sums in self._left:
            self._log.take_rest(exchanges=exchanges, sums=sums)
            self._log.begin()
        self._left = []

    def gather(self, nll_sum: torch.Tensor, group: Group) -> torch.Tensor:  # noqa: ARG002 - it is this one's
        """Return the sum of ``nll_sum``; the last backward pass has exchanged the gradients already."""
        dist.all_reduce(nll_sum)
        return nll_sum

    def gathered(self, batch_loss: BatchLoss) -> BatchLoss:
        """Return ``batch_loss`` with the root's weights gathered: it reads the head's weights without its forward."""

        def run(_: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return batch_loss(batch)

        setattr(self.model, _LOSS, MethodType(run, self.model))
        register_fsdp_forward_method(self.model, _LOSS)
        loss: BatchLoss = getattr(self.model, _LOSS)
        return loss

    def publish(self) -> None:
        """Drop gathered weights, so that the next pass gathers the current ones."""
        self._root.reshard()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies on the CPU of the full weights that this process keeps, by their names in files.

        All processes must ask.
        """
        owners = with_held(self._owners(self._stored), self._frozen.keys(), self.group)
        return gathered(self._stored, owners, self.group) | self._frozen

    def gathered_state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies on the CPU of the full ``tensors`` of the optimizer state that this process keeps."""
        return gathered(tensors, self._owners(tensors), self.group)

    def _owners(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        return owners_of(tensors, self.group.size if self.saves_parts else 1)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters to their shards of the full ``tensors``, by their names in files, and the buffers."""
        if self._trains_adapter:
            refuse_other_adapter(self._trained, tensors)
        names = dict(zip(self.masters, self._trained, strict=True))
        super().restore({**tensors, **{name: tensors[file] for name, file in names.items()}})

    def refuse_nonfinite(self, step: int) -> None:
        """Raise in every process where a master of step ``step`` is not finite in one of them.

        Raises:
            DivergedError: One is not.
        """
        finite = all(is_finite(local_part(master)) for master in self.masters.values())
        if self.group.any(not finite):
            raise DivergedError(
                f"step {step} is not saved: weights hold non-finite values",
                hint="earlier checkpoints are intact; lower training.learning_rate",
            )


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that are gathered separately: the entries of the outermost lists of modules."""
    return [layer for stack in _stacks(model) for layer in stack]


def _stacks(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Return those of each list, in which one follows the other."""
    found: list[list[torch.nn.Module]] = []
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            found.append([entry for entry in child if any(True for _ in entry.parameters())])
        else:
            found += _stacks(child)
    return found


def _prefetch(model: FSDPModule, device: torch.device) -> None:
    """Let each layer begin to gather the next one before it computes: two of them are there at once, never more."""
    for stack in _stacks(cast("torch.nn.Module", model)):
        layers = [layer for layer in stack if isinstance(layer, FSDPModule)]
        for layer, following in pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])
    if device.type == "cpu":  # elsewhere streams do it
        model._set_unshard_async_op(True)


def _mesh(processes: int, shards: int, device: torch.device) -> DeviceMesh:
    """Return one row of processes that share the weights out, or a row for each replica."""
    if shards == processes:
        return init_device_mesh(device.type, (shards,))
    return init_device_mesh(device.type, (processes // shards, shards), mesh_dim_names=("replicas", "shards"))


def _shard(
    model: torch.nn.Module, compute_dtype: torch.dtype, mesh: DeviceMesh, device: torch.device
) -> FSDPModule:
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in [*layers_of(model), model]:  # inner ones first: the root takes what is left
        plain = type(module)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # The class is a new one of another name, which would end in config.json and in messages.
        type(module).__name__, type(module).__module__ = plain.__name__, plain.__module__
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are of sums: see loss.py
            module.set_force_sum_reduction_for_comms(True)
    if not isinstance(model, FSDPModule):
        raise TypeError(f"{type(model).__name__} was not sharded")
    _prefetch(model, device)
    return model
