"""AdamW with moments of 8 bits, of masters that may be split: 10 bytes a weight with its gradient, where AdamW has 18."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sftcli.training.optim.eight_bits import BLOCK, num_blocks, packed, unpacked
from sftcli.training.weights.split import join, split

_AT_ONCE = {
    "cpu": 2**17,
    "cuda": 2**26,
}  # numbers, so that what a step needs besides stays small, and in a CPU's cache
_NOISE_BITS = 20


class LeanAdamW(torch.optim.Optimizer):
    """The updates of AdamW, computed in float32 a part of a tensor at a time.

    Its random numbers follow from ``seed``, the tensor's place and its step: they take none from those of the training, and
    the order in which tensors are updated changes nothing.

    Args:
        groups: As for ``torch.optim.AdamW``.
        remainders: The lower halves of parameters in bfloat16; those in float32 have none.
        learning_rate: The first one.
        betas: As for AdamW.
        epsilon: As for AdamW.
        seed: Of the rounding of moments.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        remainders: Mapping[torch.nn.Parameter, torch.Tensor],
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": epsilon})
        self._remainders = remainders
        self._seed = seed
        every = (parameter for group in self.param_groups for parameter in group["params"])
        self._places = {parameter: place for place, parameter in enumerate(every)}
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(
        self, parameter: torch.nn.Parameter, gradient: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        state["step"] += 1
        generator = self._generator(parameter, state["step"])
        weights, gradients = parameter.detach().view(-1), gradient.reshape(-1)
        rest = self._remainders.get(parameter)
        for part, blocks in _parts(parameter):
            moments = _Moments(state, part, blocks)
            exact = weights[part] if rest is None else join(weights[part], rest.view(-1)[part])
            update = moments.follow(gradients[part], group, state["step"], generator)
            exact.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
            if rest is not None:
                split(exact, weights[part], rest.view(-1)[part])

    def _generator(self, parameter: torch.nn.Parameter, step: int) -> torch.Generator:
        generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
        named = f"{self._seed} {self._places[parameter]} {step}".encode()
        generator.manual_seed(int.from_bytes(hashlib.blake2b(named, digest_size=7).digest()))
        return generator


class _Moments:
    """Both moments of a part of a tensor, in its optimizer's ``state``."""

    def __init__(self, state: Mapping[str, Any], part: slice, blocks: slice) -> None:
        self._places = [
            (state[name].view(-1)[part], state[f"{name}_scale"][blocks], signed)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
        ]

    def follow(
        self, gradient: torch.Tensor, group: Mapping[str, Any], step: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Move the moments by ``gradient``; return what AdamW subtracts for it."""
        (beta1, beta2), size = group["betas"], gradient.numel()
        first, second = (_padded(codes, scales, signed) for codes, scales, signed in self._places)
        gradient = _filled(gradient, first.numel())
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        noise = torch.randint(2**30, first.shape, dtype=torch.int32, device=first.device, generator=generator)
        for (codes, scales, signed), moment, bits in zip(
            self._places, (first, second), (noise & 0x7FFF, noise >> 15), strict=True
        ):
            made, scale = packed(moment, bits << (_NOISE_BITS - 15), signed=signed)
            codes.copy_(made[: codes.numel()])
            scales.copy_(scale)
        spread = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        return first.div_(spread).mul_(group["lr"] / (1 - beta1**step))[:size]


def _first_state(parameter: torch.Tensor) -> dict[str, Any]:
    scales = torch.zeros(num_blocks(parameter.numel()), dtype=torch.float32, device=parameter.device)
    codes = torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
    return {
        "step": 0,
        "exp_avg": codes,
        "exp_avg_scale": scales,
        "exp_avg_sq": codes.clone(),
        "exp_avg_sq_scale": scales.clone(),
    }


def _parts(parameter: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the parts of ``parameter``, its numbers in a row, that are updated at once, and their blocks."""
    size = _AT_ONCE.get(parameter.device.type, _AT_ONCE["cuda"])
    for begin in range(0, parameter.numel(), size):
        end = min(begin + size, parameter.numel())
        yield slice(begin, end), slice(begin // BLOCK, num_blocks(end))


def _padded(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    return unpacked(_filled(codes, scales.numel() * BLOCK), scales, signed=signed)


def _filled(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``numbers`` with zeros up to ``size``."""
    return (
        torch.nn.functional.pad(numbers, (0, size - numbers.numel())) if numbers.numel() < size else numbers
    )
