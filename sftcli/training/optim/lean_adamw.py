"""AdamW with moments of 8 bits, of masters that may be split or sharded: 10 bytes a weight with its gradient, where AdamW has 18."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sftcli.training.optim.eight_bits import Blocks, Noise, packed, unpacked
from sftcli.training.weights.placement import local_part, rows_of, zeros_by_rows
from sftcli.training.weights.split import join, split

_AT_ONCE = {
    "cpu": 2**17,
    "cuda": 2**26,
}  # numbers, so that what a step needs besides stays small, and in a CPU's cache


class LeanAdamW(torch.optim.Optimizer):
    """The updates of AdamW, computed in float32 some rows of a tensor at a time.

    Its random numbers follow from ``seed``, the tensor's place and its step: they take none from those of the training, and
    neither the order in which tensors are updated nor who has which rows of them changes anything.

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

    def first_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        """Return the state before the first step. Codes have the shape of ``parameter``, scales one for each block in its place."""
        leading = parameter.shape[:-1] if parameter.ndim > 1 else parameter.shape
        shapes = {"": tuple(parameter.shape), "_scale": (*leading, Blocks.of(parameter.shape).per_row)}
        dtypes = {"": torch.uint8, "_scale": torch.float32}
        return {"step": 0} | {
            f"{moment}{part}": zeros_by_rows(shape, like=parameter, dtype=dtypes[part])
            for moment in ("exp_avg", "exp_avg_sq")
            for part, shape in shapes.items()
        }

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
            state.update(self.first_state(parameter))
        state["step"] += 1
        blocks = Blocks.of(parameter.shape)
        weights = local_part(parameter).detach().view(-1, blocks.columns)
        gradients = local_part(gradient).reshape(-1, blocks.columns)
        rest = self._remainders.get(parameter)
        rests = None if rest is None else rest.view(-1, blocks.columns)
        moments = _Moments(state, blocks, self._noise(parameter, blocks, state["step"]))
        for rows in _parts(len(weights), blocks, weights.device):
            exact = weights[rows] if rests is None else join(weights[rows], rests[rows])
            update = moments.follow(rows, gradients[rows], group)
            exact.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
            if rests is not None:
                split(exact, weights[rows], rests[rows])

    def _noise(self, parameter: torch.nn.Parameter, blocks: Blocks, step: int) -> Noise:
        """Return the random numbers of a step, of those rows that this process has."""
        generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
        named = f"{self._seed} {self._places[parameter]} {step}".encode()
        generator.manual_seed(int.from_bytes(hashlib.blake2b(named, digest_size=7).digest()))
        (begin, end), each = rows_of(parameter), blocks.rows // max(1, *parameter.shape[:1])
        return Noise.drawn(blocks, generator).of(slice(each * begin, each * end))


class _Moments:
    """Both moments of the rows of a tensor that this process has, in its optimizer's ``state``."""

    def __init__(self, state: Mapping[str, Any], blocks: Blocks, noise: Noise) -> None:
        self._step = state["step"]
        self._blocks = blocks
        self._noise = noise
        self._places = [
            (
                local_part(state[name]).view(-1, blocks.columns),
                local_part(state[f"{name}_scale"]).view(-1, blocks.per_row),
                signed,
            )
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
        ]

    def follow(self, rows: slice, gradient: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        """Move the moments of ``rows`` by their ``gradient``; return what AdamW subtracts for it."""
        cut, (beta1, beta2) = self._blocks.cut, group["betas"]
        first, second = (
            unpacked(cut(codes[rows]), scales[rows], signed=signed) for codes, scales, signed in self._places
        )
        gradient = cut(gradient)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        halves = self._noise.halves(rows)
        for (codes, scales, signed), moment, noise in zip(self._places, (first, second), halves, strict=True):
            made, scale = packed(moment, cut(noise), signed=signed)
            codes[rows] = self._blocks.join(made)
            scales[rows] = scale
        spread = second.sqrt_().div_((1 - beta2**self._step) ** 0.5).add_(group["eps"])
        return self._blocks.join(first.div_(spread).mul_(group["lr"] / (1 - beta1**self._step)))


def _parts(rows: int, blocks: Blocks, device: torch.device) -> Iterator[slice]:
    """Yield the parts of so many rows that are updated at once."""
    numbers = _AT_ONCE.get(device.type, _AT_ONCE["cuda"])
    size = max(1, numbers // (blocks.per_row * blocks.width))
    for begin in range(0, rows, size):
        yield slice(begin, begin + size)
