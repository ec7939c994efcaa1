"""Moments of an optimizer in 8 bits a number, with a float32 scale for each block of them.

A number is divided by the largest of its block and rounded to three bits behind the point of its power of two, of which there are
16 below that of the largest for first moments, with a sign, and 32 for second ones. It is rounded up as often as it is nearer to
the upper neighbor, by random numbers: rounded to the nearest, a mean that moves by less than half of a step would stand still.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

BLOCK = 256  # numbers, at most
_DROPPED = 20  # of the 23 bits behind the point that a float32 number has, and its sign bit is not there
_ONE = 0x3F800000 >> _DROPPED  # the largest of a block, as a code
_SIGN, _MOST_SIGNED, _MOST = 0x80, 0x7F, 0xFF
_NOISE_BITS = 30  # of a random number, half of them for each moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The rows of a tensor, along its last dimension, each in blocks of the same width; a vector has rows of one number.

    No block reaches beyond its row. So whoever has some of the rows has whole blocks.
    """

    rows: int
    columns: int
    per_row: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Self:
        """Return those of a tensor of ``shape``."""
        columns = shape[-1] if len(shape) > 1 else 1
        return cls(rows=math.prod(shape) // columns, columns=columns, per_row=-(-columns // BLOCK))

    @property
    def width(self) -> int:
        """Numbers of a block; those behind the last number of a row are zeros."""
        return -(-self.columns // self.per_row)

    def cut(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` (R, columns) as blocks (R, per_row, width)."""
        spare = self.per_row * self.width - self.columns
        filled = torch.nn.functional.pad(rows, (0, spare)) if spare else rows
        return filled.view(len(rows), self.per_row, self.width)

    def join(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the rows that ``cut`` was given."""
        return blocks.flatten(1)[:, : self.columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Random numbers for each number of a tensor: the sum of one for its row and one for its column.

    Any two of them are independent of each other, so that errors of rounding add up as if all were. Whoever has some of the rows
    draws one for each row and column, and not for each number of the tensor.
    """

    of_rows: torch.Tensor  # (rows, 1)
    of_columns: torch.Tensor  # (columns,)

    @classmethod
    def drawn(cls, blocks: Blocks, generator: torch.Generator) -> Self:
        """Return that of a tensor, drawn from ``generator``."""
        size = (blocks.rows + blocks.columns,)
        drawn = torch.randint(
            2**_NOISE_BITS, size, dtype=torch.int32, device=generator.device, generator=generator
        )
        return cls(of_rows=drawn[: blocks.rows, None], of_columns=drawn[blocks.rows :])

    def of(self, rows: slice) -> Self:
        """Return that of some rows."""
        return replace(self, of_rows=self.of_rows[rows])

    def halves(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two random numbers of ``_DROPPED`` bits for each number of ``rows``."""
        half = _NOISE_BITS // 2
        both = self.of_rows[rows] + self.of_columns
        first = (both & (2**half - 1)) << (_DROPPED - half)
        return first, ((both >> half) & (2**half - 1)) << (_DROPPED - half)


def packed(blocks: torch.Tensor, noise: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of ``blocks`` as codes, and the scale of each block.

    Args:
        blocks: Float32; the last dimension is the numbers of a block.
        noise: For each number a random one of ``_DROPPED`` bits.
        signed: Whether they have signs. Those without are never rounded to zero: they divide.
    """
    scales = blocks.abs().amax(-1)
    parts = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    top = _MOST_SIGNED if signed else _MOST
    codes = ((parts.abs().view(torch.int32) + noise) >> _DROPPED) - (_ONE - top)
    codes.clamp_(0, top)
    if signed:
        codes += (parts < 0) * _SIGN
    return codes.to(torch.uint8), scales


def unpacked(codes: torch.Tensor, scales: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the numbers that ``codes``, in blocks along the last dimension, and ``scales`` stand for."""
    found = codes.int()
    if not signed:
        return _scaled(found + (_ONE - _MOST), scales)
    sizes = found & _MOST_SIGNED
    numbers = _scaled(sizes + (_ONE - _MOST_SIGNED), scales)
    numbers.masked_fill_(sizes == 0, 0.0)
    return torch.where(found >= _SIGN, -numbers, numbers)


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes << _DROPPED).view(torch.float32).mul_(scales[..., None])
