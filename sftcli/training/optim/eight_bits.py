"""Moments of an optimizer in 8 bits a number, with a float32 scale for each block of them.

A number is divided by the largest of its block and rounded to three bits behind the point of its power of two, of which there are
16 below that of the largest for first moments, with a sign, and 32 for second ones. It is rounded up as often as it is nearer to
the upper neighbor, by random numbers: rounded to the nearest, a mean that moves by less than half of a step would stand still.
"""

import torch

BLOCK = 256
_DROPPED = 20  # of the 23 bits behind the point that a float32 number has, and its sign bit is not there
_ONE = 0x3F800000 >> _DROPPED  # the largest of a block, as a code
_SIGN, _MOST_SIGNED, _MOST = 0x80, 0x7F, 0xFF


def num_blocks(numbers: int) -> int:
    """Return how many scales so many numbers have."""
    return -(-numbers // BLOCK)


def packed(numbers: torch.Tensor, noise: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``numbers`` as codes and their scales.

    Args:
        numbers: Float32, whole blocks in a row.
        noise: For each a random number of ``_DROPPED`` bits.
        signed: Whether they have signs. Those without are never rounded to zero: they divide.
    """
    blocks = numbers.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    parts = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)
    top = _MOST_SIGNED if signed else _MOST
    codes = ((parts.abs().view(torch.int32) + noise) >> _DROPPED) - (_ONE - top)
    codes.clamp_(0, top)
    if signed:
        codes += (parts < 0) * _SIGN
    return codes.to(torch.uint8), scales


def unpacked(codes: torch.Tensor, scales: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the numbers that ``codes``, whole blocks in a row, and ``scales`` stand for."""
    found = codes.int()
    if not signed:
        return _scaled(found + (_ONE - _MOST), scales)
    sizes = found & _MOST_SIGNED
    numbers = _scaled(sizes + (_ONE - _MOST_SIGNED), scales)
    numbers.masked_fill_(sizes == 0, 0.0)
    return torch.where(found >= _SIGN, -numbers, numbers)


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    parts = (codes << _DROPPED).view(torch.float32)
    return parts.view(-1, BLOCK).mul_(scales[:, None]).view(-1)
