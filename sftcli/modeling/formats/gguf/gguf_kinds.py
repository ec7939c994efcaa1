"""In which forms the matrices of a GGUF file are written: a row a form, with what its rounding may move a number by.

Those that the package ``gguf`` quantizes are written here. k-quants are made by a program of llama.cpp, from a file in 16 bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

if TYPE_CHECKING:
    import torch

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

_LEAST_F16 = 2**-25  # half of the smallest number that float16 has beside zero
_HALF = 2**-11  # what a float16 is off by, as a part of itself
_ROUTER = "ffn_gate_inp"  # chooses experts, and costs little
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
_OF_FEW_EXPERTS = ("attn_k.weight", "attn_v.weight")  # small beside eight experts
_FEW_EXPERTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How far a number of ``type`` may be from what it was: a part of the largest of its block, or of itself, and a rest.

    ``steps`` is the largest whole number that a scale of float16 is multiplied by, and with it what such a scale loses.
    """

    part: float
    steps: int = 0

    def limit(self, numbers: np.ndarray, block: int) -> np.ndarray:
        """Return the largest distance of each of ``numbers``, of which ``block`` in a row share a scale."""
        sizes = np.abs(numbers)
        if block > 1:
            largest = sizes.reshape(-1, block).max(axis=1, keepdims=True)
            sizes = np.broadcast_to(largest, (largest.size, block)).reshape(numbers.shape)
        return np.asarray(sizes * self.part + self.steps * _LEAST_F16)


# A whole number of steps is off by half a step at most: of the largest number / 127 for q8_0, and of the range, which is at most
# twice the largest number, / 15 or / 31 for q4_1 and q5_1. q4_0 and q5_0 count from -8 to 7 and from -16 to 15, so that a number
# as large as the largest, with the other sign, is off by a whole step.
ROUNDINGS: Mapping[Type, Rounding] = {
    Type.F32: Rounding(part=0.0),
    Type.F16: Rounding(part=_HALF, steps=1),
    Type.BF16: Rounding(part=2**-8),
    Type.Q8_0: Rounding(part=0.5 / 127 + 2 * _HALF, steps=127),
    Type.Q5_1: Rounding(part=1 / 31 + 4 * _HALF, steps=32),
    Type.Q5_0: Rounding(part=1 / 16 + 2 * _HALF, steps=16),
    Type.Q4_1: Rounding(part=1 / 15 + 4 * _HALF, steps=16),
    Type.Q4_0: Rounding(part=1 / 8 + 2 * _HALF, steps=8),
}
FILE_TYPES: Mapping[GgufType, tuple[Type, FileType]] = {
    "f32": (Type.F32, FileType.ALL_F32),
    "f16": (Type.F16, FileType.MOSTLY_F16),
    "bf16": (Type.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, FileType.MOSTLY_Q4_0),
}
# What rounding does to random numbers of a normal distribution: the root mean square of what is lost, as a part of theirs. Where
# the largest of 32 such numbers is 2.1 to 2.4 of their spread, a step is that / 127, / 16 and / 8, or 4.1 / 31 and / 15 of a range,
# and a number is off by a step / sqrt(12). k-quants have blocks of 16 or 32 too.
NOISES: Mapping[Type, float] = {
    Type.F32: 0.0,
    Type.F16: 2.1e-4,
    Type.BF16: 1.7e-3,
    Type.Q8_0: 5.0e-3,
    Type.Q6_K: 0.02,
    Type.Q5_1: 0.038,
    Type.Q5_0: 0.041,
    Type.Q5_K: 0.04,
    Type.Q4_1: 0.079,
    Type.Q4_0: 0.085,
    Type.Q4_K: 0.08,
    Type.Q3_K: 0.16,
    Type.Q2_K: 0.34,
}
_FLOAT32_LIMIT = 1e-4  # sums in another order
# Layers add up what is lost: logits of tiny random models of each family are 2.4 to 6.4 times as far as their numbers, those of
# SmolLM2-135M, of thirty layers, 7.8 times (q4_0).
_GAIN = 10.0
_FAR = 0.9  # at 1.0 logits of zero would be as near


def logits_limit(types: Collection[Type]) -> float:
    """Return how far the logits of a file with tensors of ``types`` may be from its model's, as a part of their spread."""
    return min(_FLOAT32_LIMIT + _GAIN * max(NOISES[kind] for kind in types), _FAR)


def types_of(tensors: Mapping[str, "torch.Tensor"], kind: GgufType) -> dict[str, Type]:
    """Return the type of each tensor in a file of ``kind``, chosen as llama.cpp chooses.

    Vectors and what chooses experts stay float32. Of quantized files, what does not fit into blocks is float16, and what
    gives the logits is q8_0, where llama.cpp has q6_K, which the package ``gguf`` does not write: the head, or the embedding
    where it is both. So are keys and values beside eight experts.
    """
    higher = {_HEAD if _HEAD in tensors else _EMBEDDING}
    if any(tensor.ndim == 3 and len(tensor) == _FEW_EXPERTS for tensor in tensors.values()):
        higher |= {name for name in tensors if name.endswith(_OF_FEW_EXPERTS)}
    asked = FILE_TYPES[kind][0]
    found = {}
    for name, tensor in tensors.items():
        wanted = Type.Q8_0 if name in higher and block_of(asked) > 1 else asked
        if tensor.ndim == 1 or _ROUTER in name:
            wanted = Type.F32
        found[name] = Type.F16 if tensor.shape[-1] % block_of(wanted) else wanted
    return found


def block_of(kind: Type) -> int:
    """Return how many numbers share a scale; 1 where each stands for itself."""
    return gguf.GGML_QUANT_SIZES[kind][0]


def is_rounded(numbers: np.ndarray, found: np.ndarray, kind: Type) -> bool:
    """Return whether ``found`` is what rounding to ``kind`` makes of ``numbers``."""
    if found.shape != numbers.shape:
        return False
    limit = ROUNDINGS[kind].limit(numbers, block_of(kind))
    return bool((np.abs(found - numbers) <= limit).all())
