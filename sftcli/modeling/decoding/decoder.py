"""The decoder of a model, chosen once per model: the fastest that a trial on short texts finds right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from sftcli.memory_faults import Attempt
from sftcli.modeling.attention import is_named
from sftcli.modeling.decoding.fused_decode import FusedRows, can_fuse, fuse
from sftcli.modeling.decoding.kv_cache import CachedRows, Rows, SingleRow, UncachedRow, uncached_logits
from sftcli.modeling.decoding.recorded import Recorder, recorder_for
from sftcli.modeling.decoding.windows import narrow_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS, _STEPS = (3, 9), 4  # of the prompts that are tried together, and steps behind them
_WINDOW = 4  # positions that layers with a window see while texts of these lengths are tried
_STRIDE = 97  # from a token of a tried text to the next
# Part of the spread of logits by which other shapes of products may move them. In few bits that is a lot, and most where
# products are other ones too; a cache that is wrong moves them by more in every step, so that the mean of the steps counts.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE, _COARSE_TOLERANCE_FUSED = 0.1, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model with the way that its rows are decoded."""

    model: "PreTrainedModel"
    make_rows: Callable[[int, Sequence[int]], Rows]  # of how many at most, and what all prompts begin with
    note: str = ""  # what to tell users of a model that decodes slowly
    goes_on_training: bool = False  # so that nothing may stay in the model that gradients cannot flow through


def decoder_in_training(model: "PreTrainedModel") -> Decoder:
    """Return the fastest decoder of ``model``, which goes on training: its weights stay as they are.

    Where a processor has a layout of its own for them, each ``make_rows`` makes a copy in it, which goes with the rows.
    """
    if not is_named(model) and can_fuse(model, goes_on_training=True):
        make_rows = partial(_rows_of_copy, model)
        if _is_right(model, make_rows, _COARSE_TOLERANCE_FUSED):
            return Decoder(model=model, make_rows=make_rows, goes_on_training=True)
    return checked_decoder(model, goes_on_training=True)


def _rows_of_copy(model: "PreTrainedModel", count: int, prefix: Sequence[int] = ()) -> Rows:
    fused = fuse(model, goes_on_training=True)
    assert fused is not None  # as when it was chosen
    return FusedRows(fused, count, prefix)


def choose_decoder(model: "PreTrainedModel") -> Decoder:
    """Return the fastest decoder of ``model``. Its weights may become views of larger tensors: not for training."""
    fused = None if is_named(model) else fuse(model)
    if fused is not None:
        for recorder in _recorders(model):
            make_rows = partial(FusedRows, fused, recorder=recorder)
            if _is_right(model, make_rows, _COARSE_TOLERANCE_FUSED):
                return Decoder(model=model, make_rows=make_rows, note=_unrecorded(model, recorder))
    return checked_decoder(model)


def checked_decoder(model: "PreTrainedModel", *, goes_on_training: bool = False) -> Decoder:
    """Return the fastest decoder with the model's own forward that matches the model on full texts.

    That is many rows with a cache of ours, one row with the model's own cache, or one row that is read anew for every token.
    Steps of a model that goes on training are not recorded: recordings would hold memory meanwhile.
    """
    recorders = (None,) if goes_on_training else _recorders(model)
    for recorder in recorders:
        make_rows = partial(CachedRows, model, recorder=recorder)
        with narrow_windows(model, _WINDOW):
            is_right = _is_right(model, make_rows)
        if is_right:
            note = "" if goes_on_training else _unrecorded(model, recorder)
            return _without_prefix(model, make_rows, note, goes_on_training=goes_on_training)
    if _is_right(model, partial(SingleRow, model)):
        return _without_prefix(model, partial(SingleRow, model), "", goes_on_training=goes_on_training)
    note = f"{type(model).__name__} has no usable KV cache here: each new token reprocesses the whole text, which is slow"
    return _without_prefix(model, partial(UncachedRow, model), note, goes_on_training=goes_on_training)


def _without_prefix(
    model: "PreTrainedModel", make_rows: Callable[[int], Rows], note: str, *, goes_on_training: bool
) -> Decoder:
    return Decoder(
        model=model,
        make_rows=lambda count, _prefix: make_rows(count),
        note=note,
        goes_on_training=goes_on_training,
    )


def _recorders(model: "PreTrainedModel") -> Sequence[Recorder | None]:
    """Return what steps are recorded with, best first."""
    recorder = recorder_for(model.device)
    return (None,) if recorder is None else (recorder, None)


def _unrecorded(model: "PreTrainedModel", recorder: Recorder | None) -> str:
    """Return what to tell users where steps might have been recorded and are not."""
    if recorder is not None or len(_recorders(model)) == 1:
        return ""
    return f"a step of {type(model).__name__} cannot be recorded as a CUDA graph: its operations are launched one by one"


@torch.no_grad()
def _is_right(
    model: "PreTrainedModel", make_rows: Callable[[int], Rows], coarse: float = _COARSE_TOLERANCE
) -> bool:
    tolerance = _TOLERANCE.get(model.dtype, coarse)
    with Attempt(Exception) as attempt:  # a class of others raises what it likes
        distances = _distances(model, make_rows(len(_LENGTHS)))
    return not attempt.failed and all(
        prompt <= tolerance and fmean(steps) <= tolerance for prompt, *steps in distances
    )


def _distances(model: "PreTrainedModel", rows: Rows) -> list[list[float]]:
    """Return how far the logits of each row are from those of its whole text, behind the prompt and behind each step.

    Rows of different lengths go on together, and the longest alone in the end.
    """
    texts = [_text(model, length) for length in _LENGTHS][-rows.capacity :]
    expected = [uncached_logits(model, text, last=_STEPS + 1) for text in texts]
    found: list[list[float]] = [[] for _ in texts]
    running = list(range(len(texts)))
    for step in range(_STEPS + 1):
        if step == _STEPS and len(running) > 1:
            rows.remove(0)
            del running[0]
        last = [texts[index][step - _STEPS - 1] for index in running] if step else []
        prompts = [] if step else [text[:-_STEPS] for text in texts]
        logits = rows.advance(torch.tensor(last, dtype=torch.int64, device=model.device), prompts)
        for index, row in zip(running, logits, strict=True):
            found[index].append(_distance(row.float(), expected[index][step].float()))
    return found


def _text(model: "PreTrainedModel", length: int) -> list[int]:
    """Return tokens from the middle of the vocabulary: those at its ends are often untrained, and rounding moves them far."""
    quarter = model.config.get_text_config(decoder=True).vocab_size // 4
    return [quarter + _STRIDE * length * place % (2 * quarter) for place in range(1, length + _STEPS + 1)]


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / (expected - expected.mean()).norm())
