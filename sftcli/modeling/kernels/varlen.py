"""Torch's kernel for a row of documents on CUDA, as each release of torch takes it.

Flash attention (Dao 2023, arXiv:2307.08691) behind ``torch.nn.attention.varlen``. It does grouped heads by itself in every
release, keys and values unrepeated; what else it can be told differs, and what it cannot do is named, never done in another way.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

from sftcli.runtime import compute_capability, dtype_name

Kernel = Callable[..., torch.Tensor]

_OLDEST_CARD = (8, 0)
_MOST_HEAD_DIM = 256
_HEAD_DIM_STEP = 8
_ROUNDING = 1e-6  # of a factor that is a power of two but for the roots that it was computed from


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What the kernel of some releases is told beside rows, bounds and longest documents."""

    since: str  # release of torch
    names: frozenset[str]

    @property
    def has_windows(self) -> bool:
        """Whether a query can be told how far back it sees."""
        return "window_size" in self.names

    @property
    def has_scale(self) -> bool:
        """Whether scores can be scaled by anything but the root of the head size."""
        return "scale" in self.names


SIGNATURES = (  # the first one of which a kernel knows every name counts
    Signature(since="2.12", names=frozenset({"scale", "window_size", "enable_gqa"})),
    Signature(since="2.11", names=frozenset({"scale", "window_size"})),
    Signature(since="2.10", names=frozenset({"is_causal"})),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one call of attention asks for; ``window`` is how many keys a query sees, itself included."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    scale: float | None = None  # None: by the root of the head size
    window: int | None = None
    dropout: float = 0.0

    @staticmethod
    def of(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        dropout: float,
    ) -> "Asked":
        """Return what is asked of ``query``, ``key`` and ``value`` (B, heads, T, D)."""
        return Asked(
            dtype=query.dtype,
            heads=query.shape[1],
            key_heads=key.shape[1],
            head_dim=query.shape[3],
            value_dim=value.shape[3],
            scale=scale,
            window=window,
            dropout=dropout,
        )

    @property
    def precision(self) -> str:
        """The name of ``dtype``."""
        return dtype_name(self.dtype)

    @property
    def factor(self) -> float:
        """What scores are multiplied by, over the root of the head size."""
        return 1.0 if self.scale is None else self.scale * math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Varlen:
    """The kernel on one device."""

    function: Kernel
    signature: Signature | None  # None: it takes arguments that are not known here
    capability: tuple[int, int]  # of the device
    release: str  # of torch
    dtypes: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})

    @property
    def missing(self) -> str | None:
        """Why it does nothing for any model here, in words; None where it does."""
        if self.capability < _OLDEST_CARD:
            return f"it needs a card of compute capability 8.0 or more, and this one has {_dotted(self.capability)}"
        if self.signature is None:
            return f"in torch {self.release} it takes other arguments than in the releases that sft knows"
        return None

    def lacks(self, asked: Asked) -> str | None:
        """Return what it cannot do of ``asked``, in words; None where it can do all of it."""
        if (missing := self.missing) is not None:
            return missing
        return next(
            (words.format(asked=asked, kernel=self) for lacks, words in _LIMITS if lacks(self, asked)), None
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        bounds: torch.Tensor,
        longest: int,
        asked: Asked,
    ) -> torch.Tensor:
        """Return (1, T, heads, D) for ``query`` (1, heads, T, D) of documents between ``bounds``, which it does not lack."""
        assert self.signature is not None
        if not self.signature.has_scale and asked.factor != 1.0:
            factor = _power_of_two(asked.factor)
            assert factor is not None
            query = query * factor  # exact, so that scores are those of the scale to the last bit
        rows = (
            part.squeeze(0).transpose(0, 1) for part in (query, key, value)
        )  # an index would cost two kernels more
        # A window is what is left and right of the query itself; -1 is no bound.
        window = (-1 if asked.window is None else asked.window - 1, 0)
        known: dict[str, Any] = {
            "scale": asked.scale,
            "window_size": window,
            "enable_gqa": True,
            "is_causal": True,
        }
        told = {name: known[name] for name in self.signature.names}
        return self.function(*rows, bounds, bounds, longest, longest, **told)[None]


_LIMITS: tuple[tuple[Callable[[Varlen, Asked], bool], str], ...] = (
    (
        lambda kernel, asked: asked.dtype not in kernel.dtypes,
        "it computes in 16 bits, and this model in {asked.precision} (training.precision)",
    ),
    (
        lambda _, asked: asked.head_dim != asked.value_dim,
        "heads of keys ({asked.head_dim}) and of values ({asked.value_dim}) differ in size",
    ),
    (
        lambda _, asked: asked.head_dim > _MOST_HEAD_DIM,
        f"it has heads of up to {_MOST_HEAD_DIM}, and this model of {{asked.head_dim}}",
    ),
    (
        lambda _, asked: asked.head_dim % _HEAD_DIM_STEP != 0,
        f"it has heads of a multiple of {_HEAD_DIM_STEP}, and this model of {{asked.head_dim}}",
    ),
    (
        lambda _, asked: asked.heads % asked.key_heads != 0,
        "{asked.heads} heads of queries cannot share {asked.key_heads} of keys",
    ),
    (lambda _, asked: asked.dropout > 0, "it has no dropout, and attention of this model has {asked.dropout}"),
    (
        lambda kernel, asked: asked.window is not None and not _signature(kernel).has_windows,
        "in torch {kernel.release} it has no windows, and layers of this model see {asked.window} tokens (torch 2.11 has them)",
    ),
    (
        lambda kernel, asked: not _signature(kernel).has_scale and _power_of_two(asked.factor) is None,
        "in torch {kernel.release} it scales by the head size alone, and this model by {asked.scale:g} (torch 2.11 can)",
    ),
)  # fmt: skip


def varlen_on(device: torch.device) -> Varlen | None:
    """Return the kernel for packed rows on ``device``; None where documents one by one cost no more than one kernel would.

    That is everywhere but on CUDA, where each document is a kernel to launch.
    """
    return _on_cuda(device) if device.type == "cuda" else None


@cache
def _on_cuda(device: torch.device) -> Varlen:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    function = cast("Kernel", varlen_attn)
    return Varlen(
        function=function,
        signature=signature_of(function),
        capability=compute_capability(device),
        release=torch.__version__.partition("+")[0],
    )


def signature_of(function: Kernel) -> Signature | None:
    """Return how ``function`` is called; None where that is not known."""
    known = inspect.signature(function).parameters.keys()
    return next((signature for signature in SIGNATURES if signature.names <= known), None)


def _power_of_two(factor: float) -> float | None:
    """Return ``factor`` where it is a power of two, by which numbers of any precision are multiplied exactly."""
    if factor <= 0:
        return None
    nearest = 2.0 ** round(math.log2(factor))
    return nearest if math.isclose(factor, nearest, rel_tol=_ROUNDING) else None


def _signature(kernel: Varlen) -> Signature:
    assert kernel.signature is not None
    return kernel.signature


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
