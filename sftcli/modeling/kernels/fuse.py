"""Layers, norms and gated feed-forward blocks of decoders as few operations that keep less for the backward pass.

The modules stay where they are, with their weights and names; only what they run while gradients are recorded changes.
They are found by what they are made of, not by the name of a model, and each one is tried first, in training mode, with
what the model itself passes to it: what does not give the output and the gradients of the module is left alone.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch

from sftcli.memory_faults import CANNOT, Attempt
from sftcli.modeling.architecture import beside_text
from sftcli.modeling.kernels.fused_layer import (
    GATED,
    Passed,
    is_layer,
    observe_layers,
    try_on_documents,
)
from sftcli.modeling.kernels.fused_math import has_dropout, norm_epsilon
from sftcli.modeling.kernels.liger import faults
from sftcli.modeling.kernels.low_rank import has_low_rank, small_low_rank
from sftcli.modeling.kernels.rotary import forward_with, tried_turns, turn_of
from sftcli.modeling.kernels.ways import Forward, Part, Way, ways_on

_TOLERANCE = 1e-4  # of float32 sums in another order; another formula is off by far more
_PROBE_SHAPE = (2, 3)
_LAYER_SHAPE = (1, 5)
_STAND_IN = (16, 24)  # inputs and middle of a feed-forward block that is tried with other projections


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Names of the module classes that run as single operations now, and of those that gave something else when tried.

    Where some modules of a class do and others do not, it stands in both, with how many.
    """

    fused: tuple[str, ...]
    left_alone: tuple[str, ...]
    parts: Sequence[tuple[torch.nn.Module, Forward]] = field(default=(), compare=False, repr=False)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let every module run what its class runs meanwhile."""
        for module, _ in self.parts:
            module.__dict__.pop("forward", None)
        try:
            yield
        finally:
            for module, forward in self.parts:
                module.forward = MethodType(forward, module)


def fuse_layers(
    model: torch.nn.Module,
    *,
    device: torch.device | None = None,
    has_adapter: bool = False,
    recorded: Collection[str] | None = None,
    hold: Callable[[torch.nn.Module], None] = lambda _: None,
) -> Fusion:
    """Let those layers, norms and feed-forward blocks of ``model`` run as few operations that give the same so.

    Args:
        model: As it was loaded.
        device: Where it will run, if not where it is.
        has_adapter: Whether an adapter is around some of its products.
        recorded: What a run that goes on has fused: no other form is tried.
        hold: Called before a module is tried, so that it has its weights.
    """
    device = device or next(model.parameters()).device
    ways = ways_on(device, has_adapter=has_adapter)
    known = None if recorded is None else {name.partition(" (")[0] for name in recorded}
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        passed = observe_layers(model) if Part.LAYER in ways else {}
        trial = _Trial(device, passed, hold)
        tried = [
            (module, *trial.chosen(module, part, [way for way in there if _is_open(module, way, known)]))
            for module, part in _candidates(model)
            if (there := [way for way in ways.get(part, ()) if way.is_there()])
        ]
    model.train(was_training)
    parts = [(module, forward) for module, _, forward in tried if forward is not None]
    for module, forward in parts:
        module.forward = MethodType(forward, module)
    kinds = Counter(type(module) for module, *_ in tried)
    fused = Counter((type(module), way.by) for module, way, _ in tried if way is not None)
    alone = Counter((type(module), "") for module, way, _ in tried if way is None)
    return Fusion(fused=_names(fused, kinds), left_alone=_names(alone, kinds), parts=parts)


def _names(
    found: Mapping[tuple[type[torch.nn.Module], str], int], kinds: Mapping[type[torch.nn.Module], int]
) -> tuple[str, ...]:
    return tuple(
        sorted(
            _name(kind, by) + ("" if count == kinds[kind] else f" ({count} of {kinds[kind]})")
            for (kind, by), count in found.items()
        )
    )


def _name(kind: type[torch.nn.Module], by: str) -> str:
    return f"{kind.__name__} by {by}" if by else kind.__name__


def _is_open(module: torch.nn.Module, way: Way, known: Collection[str] | None) -> bool:
    return known is None or _name(type(module), way.by) in known


def restore_layers(model: torch.nn.Module) -> None:
    """Undo ``fuse_layers``."""
    for module, _ in _candidates(model):
        module.__dict__.pop("forward", None)


def _candidates(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Part]]:
    beside = beside_text(model)
    for name, module in model.named_modules():
        if beside and any(f"{name}.{weight}" in beside for weight, _ in module.named_parameters()):
            continue
        children = dict(module.named_children())
        if _is_plain_norm(module):
            yield module, Part.NORM
        elif set(GATED) <= set(children) <= {*GATED, "act_fn"} and callable(getattr(module, "act_fn", None)):
            yield module, Part.GATE
        elif is_layer(module):
            yield module, Part.LAYER
        elif turn_of(module) is not None:
            yield module, Part.ROTARY
        elif has_low_rank(module):
            yield module, Part.LOW_RANK


def _is_plain_norm(module: torch.nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return (
        type(module).__name__.endswith("RMSNorm") and names == ["weight"] and norm_epsilon(module) is not None
    )


class _Trial:
    """Tries the faster forms of modules of one model, where they will run."""

    def __init__(
        self,
        device: torch.device,
        passed: Mapping[torch.nn.Module, Passed],
        hold: Callable[[torch.nn.Module], None],
    ) -> None:
        self.device = device
        self.passed = passed
        self.hold = hold
        self.seen: set[type[torch.nn.Module]] = set()

    def chosen(
        self, module: torch.nn.Module, part: Part, ways: Sequence[Way]
    ) -> tuple[Way | None, Forward | None]:
        """Return the first of ``ways`` that gives what ``module`` gives, and what it runs then; None where none does."""
        is_first = type(module) not in self.seen
        self.seen.add(type(module))
        if has_dropout(module, attends=part is Part.LAYER) and part is not Part.ROTARY:
            return None, None
        if ways and part is not Part.ROTARY:  # that turns numbers of its own
            self.hold(module)
        for way in ways:
            forward = self._agreed(module, part, way, whole=is_first)
            if forward is not None:
                return way, forward
        return None, None

    @torch.enable_grad()
    def _agreed(self, module: torch.nn.Module, part: Part, way: Way, *, whole: bool) -> Forward | None:
        """Return what ``module`` runs in this ``way`` if it gives the same, else None."""
        forward: Forward = way.forward
        found: Sequence[Sequence[torch.Tensor]] | None = None
        with Attempt(*CANNOT, *faults()):
            if part is Part.ROTARY:
                found = tried_turns(module, way.forward, self.device)
                forward = forward_with(module, way.forward)
            elif part is Part.LAYER:
                if module not in self.passed:
                    return None
                forward = partial(forward, window=self.passed[module].window)
                found = _tried(module, forward, self.passed[module], whole=whole)
            elif part is Part.LOW_RANK:
                found = _tried(small_low_rank(module, self.device), forward, whole=True)
            else:
                found = _tried(self._in_float32(module, part), forward, whole=whole)
        return forward if found is not None and _are_close(*found) else None

    def _in_float32(self, module: torch.nn.Module, part: Part) -> torch.nn.Module:
        """Return ``module`` itself, or where rounding or a device stands between, a copy that tells as much.

        That of a norm has its weight. That of a feed-forward block has small products of its own, whatever is around or in
        those of ``module``: what runs between them is what is tried.
        """
        weights = list(module.parameters())
        if all(weight.dtype is torch.float32 and weight.device == self.device for weight in weights):
            return module
        made = copy.copy(module)
        if part is Part.NORM:
            fresh = {
                name: weight.detach().to(self.device, torch.float32)
                for name, weight in module.named_parameters()
            }
            made.__dict__["_parameters"] = {
                name: torch.nn.Parameter(weight) for name, weight in fresh.items()
            }
            return made
        width, middle = _STAND_IN
        sizes = dict(zip(GATED, ((width, middle), (width, middle), (middle, width)), strict=True))
        products = {name: torch.nn.Linear(*size, bias=False).to(self.device) for name, size in sizes.items()}
        made.__dict__["_modules"] = module._modules | products
        return made


def _tried(
    module: torch.nn.Module, forward: Forward, passed: Passed | None = None, *, whole: bool
) -> list[list[torch.Tensor]]:
    """Return output and gradients of ``module`` by its class, and those of ``forward``.

    Gradients of matrices, which cost the most, are among them for the first of a class (``whole``): one module differs from
    another in what it computes, and the gradient of its input tells that.
    """
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (*(_PROBE_SHAPE if passed is None else _LAYER_SHAPE), weight.shape[-1])
    x, back = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    x.requires_grad_()
    wanted = [x, *(part for part in module.parameters() if part.requires_grad and (whole or part.ndim < 2))]
    if passed is None:
        made = type(module).forward(module, x), forward(module, x)
    else:
        made = try_on_documents(module, forward, x, passed)
    return [[one.detach(), *torch.autograd.grad(one, wanted, back)] for one in made]


def _are_close(plain: Sequence[torch.Tensor], fused: Sequence[torch.Tensor]) -> bool:
    """Compare each tensor by its size: what is small, as gradients of queries are, must be right too."""
    return all(
        left.shape == right.shape and bool((left - right).norm() <= _TOLERANCE * left.norm())
        for left, right in zip(plain, fused, strict=True)
    )
