"""Whether examples can be packed into one input row: checked on the model itself, with a few rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from sftcli.config.schema.training import PackRows, TrainingSettings
from sftcli.data.batches.batch import ExampleSource, Packing, collate_packed
from sftcli.data.example import Example
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.memory_faults import Attempt
from sftcli.modeling.attention import attention_of, is_named
from sftcli.modeling.kernels.document_attention import (
    PLAIN,
    Overheard,
    attend_as_before,
    attend_by_document,
    attends_by_document,
    computed_by,
    overheard,
)
from sftcli.modeling.kernels.experts import experts_by_document
from sftcli.modeling.kernels.flash_switch import switch_back, switch_flash, switched_to
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.rows import cut_rows
from sftcli.training.probes.untouched import left_as_it_was
from sftcli.training.random_streams import capture_rng, restore_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Packs = Sequence[Sequence[Example]]

# Part by which logits of a row may differ from those that it gets alone, where products have other shapes. On SmolLM2-135M
# they differed by 2e-6 in float32 and 0.03 in bfloat16, and by 0.7 once positions went on. Whether documents see each
# other is another question, which is answered without a tolerance.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1
_PASSES = 4  # forward, over the rows that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPacking:
    """How examples share rows, and how they are isolated there; ``packing`` is None if rows are not packed."""

    kind: RowSharing
    packing: Packing | None = None


def sharing_to_try(
    model: "PreTrainedModel", settings: TrainingSettings, recorded: str | None = None
) -> RowSharing:
    """Return how rows of ``model`` would be kept apart first, by its attention, the settings and what is ``recorded`` of a run."""
    is_auto = settings.packing is PackRows.AUTO
    if (
        settings.packing is PackRows.OFF
        or recorded == RowSharing.NONE
        or (is_auto and settings.neftune_alpha)
    ):
        return RowSharing.NONE
    if recorded != RowSharing.MASK:
        has_bounds = attend_by_document(model) or attention_of(model).startswith("flash_attention")
        attend_as_before(model)
        if has_bounds:
            return RowSharing.BOUNDS
    return RowSharing.NONE if is_auto else RowSharing.MASK


def choose_packing(
    model: "PreTrainedModel",
    examples: ExampleSource,
    *,
    longest: int,
    settings: TrainingSettings,
    pad_id: int,
    emit: EventSink,
    recorded: str | None = None,
    kernel: str | None = None,
    ruled_out: RowSharing | None = None,
) -> ChosenPacking:
    """Return how examples share rows; prepares the attention of ``model``.

    A few of ``examples`` are tried; ``longest`` is the length of the longest one that will ever be packed. Of a run that
    has ``recorded`` how, and by which ``kernel`` (``attention_in_words``), only that is tried, and never what is
    ``ruled_out`` because its gradients are others.

    Documents are kept apart by an attention that gets their bounds, or, where packing is asked for and the model has no
    such attention, by the mask that the model makes from positions. On a CPU the mask is slower than padding: 263
    against 275 tokens/s, and 300 with bounds (SmolLM2-135M in bfloat16 on two cores, 8 rows of 200 tokens a step). On CUDA
    bounds are for one kernel: without it each document of each layer is launched by itself, which is done only where packing
    is asked for.

    Raises:
        UsageError: Packing is asked for, and the model lets packed documents attend to each other.
    """
    alone = ChosenPacking(kind=RowSharing.NONE)
    switch_back()
    if settings.packing is PackRows.OFF or recorded == RowSharing.NONE:
        return alone
    if settings.packing is PackRows.AUTO and settings.neftune_alpha:
        emit(Notice(text="rows are not packed: NEFTune noise depends on the length of a row"))
        return alone
    budget = max(longest, settings.micro_batch_tokens or settings.micro_batch_size * longest)
    probe = Probe(model, examples, pad_id)
    if ruled_out != RowSharing.BOUNDS and sharing_to_try(model, settings, recorded) is RowSharing.BOUNDS:
        attend_by_document(model)
        if probe.keeps_apart([probe.rows]):
            must = settings.packing is PackRows.ON or recorded is not None
            if _has_kernel(model, probe.heard, must=must, recorded=kernel, emit=emit):
                return _announced(RowSharing.BOUNDS, Packing(row_tokens=budget), emit)
            attend_as_before(model)
            return alone
        attend_as_before(model)
    if settings.packing is PackRows.ON:
        if ruled_out != RowSharing.MASK and probe.keeps_apart([probe.rows[:2], probe.rows[2:]]):
            return _announced(RowSharing.MASK, Packing(row_tokens=longest, rows=budget // longest), emit)
        raise UsageError(
            f"rows cannot be packed: {type(model).__name__} lets packed documents attend to each other",
            hint="leave out --packing, or pass --packing off",
            location=Location(key="training.packing"),
        )
    what = f"attention {attention_of(model)}" if is_named(model) else "attention here"
    emit(_not_packed(f"{type(model).__name__} has no {what} that keeps documents of one row apart"))
    return alone


def attention_in_words(model: "PreTrainedModel", kind: RowSharing) -> str:
    """Return what computes the attention of ``model`` whose rows ``choose_packing`` has put together so, for records.

    That is "varlen" (torch's kernel for packed rows), "varlen fa3" or "varlen fa4" (what it was switched to), "by document",
    or the attention by the name that transformers has for it, with "padded", "masked" or "packed".
    """
    if kind is RowSharing.BOUNDS and attends_by_document(model):
        return computed_by(model)
    name = PLAIN if attends_by_document(model) else attention_of(model)
    if kind is RowSharing.BOUNDS:
        return f"{name} packed"
    return f"{name} masked" if kind is RowSharing.MASK else f"{name} padded"


def _has_kernel(
    model: "PreTrainedModel", heard: Overheard, *, must: bool, recorded: str | None, emit: EventSink
) -> bool:
    """Return whether rows are packed with the attention that was ``heard``, and take the newest kernel for it.

    On a device whose kernel for packed rows does not fit the model they are packed only if they ``must`` be, and it is said.
    """
    kernel = next((call.kernel for call in heard.calls if call.kernel is not None), None)
    if kernel is None:  # documents one by one are as fast
        return True
    if heard.lacks is not None:
        why = f"torch's kernel for packed rows does not fit {type(model).__name__}: {heard.lacks}"
        slow = f"rows are packed, but attention takes their documents one by one, which is slow: {why}; without packing: --packing off"
        emit(Warned(text=slow) if must else _not_packed(why))
        return must
    asked = {call.asked for call in heard.calls if call.kernel is not None}
    for refused in switch_flash(kernel, asked, model.device, recorded=recorded):
        emit(Notice(text=f"{refused.name} is installed and not used for attention: {refused.why}"))
    if (name := switched_to()) is not None:
        emit(Notice(text=f"attention is computed by {name.upper()}, which torch was switched to"))
    return True


class Probe:
    """Runs a few rows, cut to what fits, packed and alone."""

    def __init__(self, model: "PreTrainedModel", examples: ExampleSource, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self.rows = cut_rows(model, examples, work=2 * _PASSES)
        self.heard = Overheard()  # in the newest trial

    @torch.no_grad()
    def keeps_apart(self, packs: Packs) -> bool:
        """Return whether no row of ``packs`` depends on another one, and each gets the logits that it gets alone.

        One row in a pack gets other tokens, of the same number: then every product has the shape that it had, and the logits
        of all other rows must be the same bit for bit, as in training: with its precision, its faster layers and the same random
        numbers. Experts take rows one by one for that: how many of their tokens an expert gets changes the shape of its products.
        That says nothing about positions, which must begin anew in each row; so the logits are compared with those of the rows
        alone, up to rounding.
        """
        place = max(0, len(packs[0]) - 2)  # with rows before it, where there are, and behind it
        other = [[*packs[0][:place], _with_other_tokens(packs[0][place]), *packs[0][place + 1 :]], *packs[1:]]
        with Attempt() as attempt, left_as_it_was(self._model), overheard() as self.heard:
            trained, replaced = (self._in_training(each) for each in (packs, other))
            self._model.train(False)
            packed = self.by_row(packs)
            alone = [self.by_row([[row]])[0] for row in chain.from_iterable(packs)]
        if attempt.failed:
            return False  # a model that cannot be told of documents at all
        is_kept = [index != place for index in range(len(packed))]
        is_apart = all(
            torch.equal(left, right)
            for left, right, kept in zip(trained, replaced, is_kept, strict=True)
            if kept
        )
        tolerance = _TOLERANCE.get(packed[0].dtype, _COARSE_TOLERANCE)
        differences = map(difference, packed, alone)
        return self.heard.is_complete and is_apart and all(part <= tolerance for part in differences)

    def _in_training(self, packs: Packs) -> list[torch.Tensor]:
        """Return the logits of each row as a step makes them, each time with the same random numbers."""
        random = capture_rng()
        self._model.train()
        with torch.enable_grad():
            logits = self.by_row(packs)
        restore_rng(random)
        return [part.detach() for part in logits]

    def by_row(self, packs: Packs) -> list[torch.Tensor]:
        """Return the logits (T, V) of each row of ``packs``."""
        lengths = [[len(example.input_ids) for example in pack] for pack in packs]
        count = sum(map(len, lengths))
        batch = collate_packed(packs, example_ids=range(count), pad_id=self._pad_id)
        if count == 1:
            batch = replace(batch, documents=None)
        width = batch.input_ids.shape[1]
        pieces = [[*counts, width - sum(counts)] for counts in lengths]  # the last one is padding
        with experts_by_document(self._model, list(chain.from_iterable(pieces))):
            logits = self._model(**batch.to(self._model.device).inputs, use_cache=False).logits
        return [
            part
            for row, counts in zip(logits, pieces, strict=True)
            for part in row.split(counts)[: len(counts) - 1]
        ]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far ``found`` (T, V) is from ``expected``, as a part of how much that varies; NaN where one is."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _with_other_tokens(example: Example) -> Example:
    """Return ``example`` with another of its tokens at each place, or the next token where it has only one."""
    known = np.unique(example.input_ids)
    places = np.searchsorted(known, example.input_ids)
    other = known[(places + 1) % len(known)] if len(known) > 1 else example.input_ids - 1
    return replace(example, input_ids=np.abs(other).astype(example.input_ids.dtype))


def _not_packed(why: str) -> Notice:
    return Notice(text=f"rows are not packed: {why}; rows of similar length share a micro-batch")


def _announced(kind: RowSharing, packing: Packing, emit: EventSink) -> ChosenPacking:
    rows = "one row" if packing.rows == 1 else f"{packing.rows} rows"
    emit(
        Notice(
            text=f"rows are packed: up to {packing.row_tokens * packing.rows} tokens in {rows} of a micro-batch"
        )
    )
    return ChosenPacking(kind=kind, packing=packing)
