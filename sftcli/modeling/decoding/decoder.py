"""The decoder of a model, chosen once per model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from sftcli.modeling.attention import is_named
from sftcli.modeling.decoding.fused_decode import FusedRows, fuse
from sftcli.modeling.decoding.kv_cache import CachedRows, Rows, SingleRow, UncachedRow, uncached_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS, _STEPS = (3, 9), 2  # of the prompts that are tried together, and steps behind them
_TOLERANCE = {
    torch.float32: 1e-3
}  # part of the spread of logits by which other shapes of products may move them
_COARSE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model with the way that its rows are decoded."""

    model: "PreTrainedModel"
    make_rows: Callable[[int, Sequence[int]], Rows]  # of how many at most, and what all prompts begin with
    note: str = ""  # what to tell users of a model that decodes slowly


def choose_decoder(model: "PreTrainedModel") -> Decoder:
    """Return the fastest decoder of ``model``. Its weights may become views of larger tensors: not for training."""
    fused = None if is_named(model) else fuse(model)
    return (
        checked_decoder(model) if fused is None else Decoder(model=model, make_rows=partial(FusedRows, fused))
    )


def checked_decoder(model: "PreTrainedModel") -> Decoder:
    """Return the fastest decoder with the model's own forward that matches the model on full texts.

    That is many rows with a cache of ours, one row with the model's own cache, or one row that is read anew for every token.
    """
    kind = next((kind for kind in (CachedRows, SingleRow) if _is_right(model, kind)), UncachedRow)
    note = f"{type(model).__name__} has no usable KV cache here: each new token reprocesses the whole text, which is slow"
    return Decoder(
        model=model,
        make_rows=lambda count, _prefix: kind(model, count),
        note=note if kind is UncachedRow else "",
    )


@torch.inference_mode()
def _is_right(model: "PreTrainedModel", kind: Callable[["PreTrainedModel", int], Rows]) -> bool:
    tolerance = _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE)
    try:
        rows = kind(model, len(_LENGTHS))
        texts = [[token + length for token in range(length)] for length in _LENGTHS][-rows.capacity :]
        logits = rows.advance(torch.empty(0, dtype=torch.int64, device=model.device), texts)
        for token in range(_STEPS):
            if not _are_alike(logits, texts, model, tolerance):
                return False
            texts = [[*text, token + len(text)] for text in texts]
            last = torch.tensor([text[-1] for text in texts], device=model.device)
            logits = rows.advance(last, [])
        return _are_alike(logits, texts, model, tolerance)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError):
        return False


def _are_alike(
    logits: torch.Tensor, texts: Sequence[Sequence[int]], model: "PreTrainedModel", tolerance: float
) -> bool:
    expected = torch.cat([uncached_logits(model, text) for text in texts]).float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((logits.float() - expected).norm(dim=-1) <= tolerance * spread).all())
