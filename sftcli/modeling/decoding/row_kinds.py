"""Which way to decode a model's rows is right, tried on the model itself against its forward pass on whole texts."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from sftcli.modeling.decoding.fused_decode import fused_step
from sftcli.modeling.decoding.kv_cache import LoneRow, Rows, SlotRows, WholeRow, has_plain_cache, whole_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeRows = Callable[["PreTrainedModel", int], Rows]

_LENGTHS, _STEPS = (3, 9), 2  # of the prompts that are tried together, and steps behind them
_TOLERANCE = {
    torch.float32: 1e-3
}  # part of the spread of logits by which other shapes of products may move them
_COARSE_TOLERANCE = 0.1

_known: "WeakKeyDictionary[PreTrainedModel, MakeRows]" = WeakKeyDictionary()


def fitting_rows(model: "PreTrainedModel") -> MakeRows:
    """Return the fastest way to decode rows that gives what the model gives for whole texts.

    That is many rows with a cache of ours, one row with the model's own cache, or one row that is read anew for every token.
    """
    if model not in _known:
        ways: tuple[MakeRows, ...] = (_slots, _lone)
        _known[model] = next((way for way in ways if _is_right(model, way)), _whole)
    return _known[model]


def cache_note(model: "PreTrainedModel") -> str:
    """Return what to tell of a model whose texts are read anew for every token; "" of any other."""
    if fused_step(model) is not None or fitting_rows(model) is not _whole:
        return ""
    return f"{type(model).__name__} keeps no cache that is right here: each new token reads the whole text again, which is slow"


def _slots(model: "PreTrainedModel", count: int) -> Rows:
    if not has_plain_cache(model):
        raise TypeError("its layers keep something other than all keys")
    return SlotRows(model, count)


def _lone(model: "PreTrainedModel", _: int) -> Rows:
    return LoneRow(model)


def _whole(model: "PreTrainedModel", _: int) -> Rows:
    return WholeRow(model)


@torch.inference_mode()
def _is_right(model: "PreTrainedModel", make: MakeRows) -> bool:
    tolerance = _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE)
    try:
        rows = make(model, len(_LENGTHS))
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
    expected = torch.cat([whole_logits(model, text) for text in texts]).float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((logits.float() - expected).norm(dim=-1) <= tolerance * spread).all())
