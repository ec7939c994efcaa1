"""Float32 masters of a model that computes in another dtype, and those of an adapter alone.

Master weights, optimizer moments and gradient sums are float32 whatever the products run in: at a learning rate of 1e-5
an update is smaller than the spacing of bfloat16 numbers and would be rounded away.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
import torch.distributed as dist

from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError, Location, MismatchError, UsageError
from sftcli.runtime import is_finite
from sftcli.training.distributed.gradient_exchange import GradientExchange
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.loss import BatchLoss
from sftcli.training.weights.placement import placed_as

_OF_ADAPTERS = (".lora_", ".token_adapter.")  # in names that peft gives


class MasterWeights:
    """Float32 masters of the trainable parameters of a model that computes in ``compute_dtype``.

    With ``compute_dtype`` float32 the masters are the parameters themselves. Otherwise each parameter becomes a rounded
    copy, whose gradient is added to the master's float32 gradient, and ``publish`` rounds the updated masters into the copies.

    Args:
        model: It is changed.
        compute_dtype: Of matrix products.
        collects_at_once: Add a gradient as soon as the backward pass has made it, so that those of the copies are never there
            together; else ``collect`` adds all of them behind the pass, which spares a call of Python for each.
    """

    is_sharded = False  # whether this process holds a part of them only
    saves_parts = False  # whether each process has its part of a snapshot, and not the first one all of it
    keeps_frozen = True  # whether snapshots hold what does not train
    shard_group: ShardGroup | None = None  # the processes among which masters are shared out
    _exchange: GradientExchange | None = None  # with other processes

    def __init__(
        self, model: torch.nn.Module, *, compute_dtype: torch.dtype, collects_at_once: bool = True
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.collects_at_once = collects_at_once
        self.masters: dict[str, torch.nn.Parameter] = {}
        self.remainders: dict[str, torch.Tensor] = {}  # of masters that are split, their lower halves
        self._copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._frozen: dict[str, torch.Tensor] = {}
        self.has_buffers = bool(stored_buffers(model))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                if parameter.is_floating_point():  # 4-bit weights are packed in bytes
                    self._round_frozen(name, parameter, keep=self.keeps_frozen)
            elif compute_dtype == torch.float32:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                self.masters[name] = self._split(name, parameter)

    def _round_frozen(self, name: str, parameter: torch.nn.Parameter, *, keep: bool) -> None:
        """Round a weight that does not train. Where that loses something it is kept as it was: what is written is exact."""
        exact, parameter.data = parameter.data, self._rounded(name, parameter.data)
        if keep and not is_exact(parameter.data, exact):
            half = exact.half()
            self._frozen[name] = (half if is_exact(half, exact) else exact).cpu()

    def _rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` as the products have it.

        Raises:
            UsageError: It has numbers that float16 has not.
        """
        self._require_range(name, weight)
        return weight.to(self.compute_dtype)

    def _require_range(self, name: str, weight: torch.Tensor) -> None:
        """Make sure that the products can have ``weight``.

        Raises:
            UsageError: It has numbers that float16 has not.
        """
        if self.compute_dtype == torch.float16 and not is_finite(weight.half()):
            raise beyond_float16(name)

    def _split(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        master = torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        parameter.data = self._rounded(name, parameter.data)

        def collect(_: torch.Tensor) -> None:
            _add_gradients([(parameter, master)])

        if self.collects_at_once:
            parameter.register_post_accumulate_grad_hook(collect)
        self._copies.append((parameter, master))
        return master

    def tell_gradients(self, heard: Callable[[torch.nn.Parameter], None]) -> None:
        """Call ``heard`` with each master as soon as its gradient of a pass is whole; gradients must be collected at once."""
        assert self.collects_at_once
        for parameter, master in self._copies or [(master, master) for master in self.masters.values()]:
            parameter.register_post_accumulate_grad_hook(lambda _, master=master: heard(master))

    def publish_one(self, master: torch.nn.Parameter) -> None:
        """Round ``master`` into the parameter that the model computes with."""
        if self._copies:
            self._copy_of[master].copy_(master)

    @cached_property
    def _copy_of(self) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        return {master: copy.detach() for copy, master in self._copies}

    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the masters, where the pass has not done so."""
        if not self.collects_at_once:
            _add_gradients(self._copies)

    def micro_batches(self, batches: Iterable[Batch], group: Group) -> Iterator[tuple[Batch, float]]:
        """Yield this process's share of ``batches``, each with the weight of its loss in the sum."""
        if group.size == 1:
            yield from ((batch, 1.0) for batch in batches)
            return
        exchange = self._exchange_in(group)
        exchange.begin()
        own = [batch for batch, is_own in group.batches(batches) if is_own]
        for batch in own[:-1]:
            yield batch, 1.0
        if self.collects_at_once:
            exchange.listen()
        for batch in own[-1:]:
            yield batch, 1.0
        exchange.send_rest()

    def _exchange_in(self, group: Group) -> GradientExchange:
        """Return what sums the gradients; the hooks that it needs are there from the first step of several processes on."""
        if self._exchange is None:
            self._exchange = GradientExchange(self.masters.values(), group)
            if self.collects_at_once:
                self.tell_gradients(self._exchange.hear)
        return self._exchange

    def can_give_up(self, group: Group) -> bool:
        """Return whether a step that broke off in this process can be taken again, as the others find out behind its exchange."""
        return group.size == 1 or (self._exchange is not None and self._exchange.is_open)

    def give_up_exchange(self) -> None:
        """Let the other processes finish the exchange of a step that all of them take again."""
        if self._exchange is not None:
            self._exchange.give_up()

    def gathered(self, batch_loss: BatchLoss) -> BatchLoss:
        """Return ``batch_loss`` with every weight that it reads gathered."""
        return batch_loss

    def gather(self, nll_sum: torch.Tensor, group: Group) -> torch.Tensor:
        """Return the sum of ``nll_sum`` over the processes, when the gradients of the masters are such sums too."""
        if group.size > 1:
            self._exchange_in(group).finish()
            dist.all_reduce(nll_sum)
        return nll_sum

    def publish(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        if self._copies:
            copies, masters = zip(*self._copies, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(list(copies), list(masters))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every weight of the model by name: the masters, and the frozen weights and buffers as loaded."""
        written = self._frozen | self.masters
        weights = {name: written.get(name, weight).detach() for name, weight in self.model.named_parameters()}
        return weights | stored_buffers(self.model)

    def gathered_state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those full ``tensors`` of the optimizer state that this process writes. All processes must call it."""
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
        filled = {name: master.detach() for name, master in self.masters.items() if master.numel()}
        # The least and the greatest of each; a NaN is both. They are read together, so that a device is waited for once.
        ends = torch.stack([torch.stack(torch.aminmax(master)) for master in filled.values()])
        for name, holds in zip(filled, ends.isfinite().all(1).tolist(), strict=True):
            if not holds:
                raise DivergedError(
                    f"step {step} is not saved: {name} holds non-finite values",
                    hint="earlier checkpoints are intact; lower training.learning_rate",
                )


class AdapterWeights(MasterWeights):
    """Float32 masters of the adapter alone. Snapshots hold nothing else, under the names that ``file_name`` gives."""

    keeps_frozen = False

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        compute_dtype: torch.dtype,
        file_name: Callable[[str], str],
        collects_at_once: bool = True,
    ) -> None:
        super().__init__(model, compute_dtype=compute_dtype, collects_at_once=collects_at_once)
        self._file_names = {name: file_name(name) for name in self.masters}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the masters by their names in files."""
        return {self._file_names[name]: master.detach() for name, master in self.masters.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters to ``tensors``, by their names in files, and publish them.

        Raises:
            MismatchError: They are of an adapter on other layers.
        """
        refuse_other_adapter(self._file_names.values(), tensors)
        super().restore({name: tensors[file] for name, file in self._file_names.items()})


@torch.no_grad()
def _add_gradients(copies: Sequence[tuple[torch.nn.Parameter, torch.nn.Parameter]]) -> None:
    """Move the gradients of ``copies`` into the float32 gradients of their masters."""
    made = [(copy.grad, master) for copy, master in copies if copy.grad is not None]
    first = [(gradient, master) for gradient, master in made if master.grad is None]
    more = [(gradient, master.grad) for gradient, master in made if master.grad is not None]
    if first:
        sums = [torch.empty_like(gradient, dtype=master.dtype) for gradient, master in first]
        torch._foreach_copy_(sums, [gradient for gradient, _ in first])
        for total, (_, master) in zip(sums, first, strict=True):
            master.grad = total
    if more:
        torch._foreach_add_([total for _, total in more], [gradient for gradient, _ in more])
    for copy, _ in copies:
        copy.grad = None


def beyond_float16(name: str) -> UsageError:
    """Return the error for a weight ``name`` that float16 has no numbers for."""
    return UsageError(
        f"{name} holds numbers above 65504, which float16 has not",
        hint="train in float32: --set training.precision=fp32, or in bf16 where the device has it",
        location=Location(key="training.precision"),
    )


def refuse_other_adapter(needed: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise unless a checkpoint holds what an adapter needs, and nothing of other layers.

    Raises:
        MismatchError: The adapter was put on other layers when the run began, by another version of this program.
    """
    if other := sorted(
        set(needed) ^ {name for name in tensors if any(part in name for part in _OF_ADAPTERS)}
    ):
        raise MismatchError(
            f"the checkpoint has its adapter on other layers than this version chooses: {other[0]}",
            hint="resume with the version that began it, or train on from it in a new run: sft train --model CHECKPOINT",
        )


def stored_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that files of ``model`` hold besides its parameters, such as the routing bias of experts.

    All processes that share the weights out must ask: whoever does drops what was gathered.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}


def is_exact(rounded: torch.Tensor, exact: torch.Tensor) -> bool:
    """Return whether ``rounded`` lost nothing of ``exact``."""
    return torch.equal(rounded.to(exact.dtype), exact)
