"""Whether examples may share a row of the model's input: tried on the model itself, with a few rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from sftcli.config.training_settings import PackRows, TrainingSettings
from sftcli.data.batch import Batch, ExampleSource, Packing, collate, collate_packed
from sftcli.data.example import Example
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice
from sftcli.modeling.document_attention import attend_as_before, attend_by_document, attention_of
from sftcli.training.choices import RowSharing
from sftcli.training.loss import MAX_CHUNK_LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Packs = Sequence[Sequence[Example]]

# Part by which logits of a row may differ when others are in its row. On SmolLM2-135M they differed by 2e-6 in float32
# and 0.03 in bfloat16, and by 0.7 once documents saw each other or positions went on.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1
_PROBE_TOKENS = 600  # of all probed rows together, to save time
_MEASURED = (
    "cpu",
    "cuda",
)  # devices with an attention for documents that costs what the documents cost apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPacking:
    """How examples share rows, and how they are kept apart there; ``packing`` is None where each gets a row of its own."""

    kind: RowSharing
    packing: Packing | None = None


def choose_packing(
    model: "PreTrainedModel",
    examples: ExampleSource,
    *,
    longest: int,
    settings: TrainingSettings,
    pad_id: int,
    emit: EventSink,
    recorded: str | None = None,
) -> ChosenPacking:
    """Return how examples share rows; prepares the attention of ``model``.

    A few of ``examples`` are tried; ``longest`` is the length of the longest one that will ever be packed. Of a run that
    has ``recorded`` how, only that is tried.

    Documents are kept apart by an attention that gets their bounds, or, where packing is asked for and the model has no
    such attention, by the mask that the model makes from positions. On a CPU the mask is slower than padding: 263
    against 275 tokens/s, and 300 with bounds (SmolLM2-135M in bfloat16 on two cores, 8 rows of 200 tokens a step).

    Raises:
        UsageError: Packing is asked for, and the model lets documents of one row see each other.
    """
    alone = ChosenPacking(kind=RowSharing.NONE)
    if settings.packing is PackRows.OFF or recorded == RowSharing.NONE:
        return alone
    if settings.packing is PackRows.AUTO and settings.neftune_alpha:
        emit(Notice(text="rows are not packed: the noise of NEFTune depends on the length of a row"))
        return alone
    budget = max(longest, settings.micro_batch_tokens or settings.micro_batch_size * longest)
    probe = _Probe(model, examples, pad_id)
    if recorded != RowSharing.MASK and (settings.packing is PackRows.ON or model.device.type in _MEASURED):
        has_bounds = attend_by_document(model) or attention_of(model).startswith("flash_attention")
        if has_bounds and probe.keeps_apart([probe.rows]):
            return _told(RowSharing.BOUNDS, Packing(row_tokens=budget), emit)
        attend_as_before(model)
    if settings.packing is PackRows.ON:
        if probe.keeps_apart([probe.rows[:2], probe.rows[2:]]):
            return _told(RowSharing.MASK, Packing(row_tokens=longest, rows=budget // longest), emit)
        raise UsageError(
            f"rows cannot be packed: {type(model).__name__} lets documents of one row see each other",
            hint="leave out --packing, or pass --packing off",
            location=Location(key="training.packing"),
        )
    emit(
        Notice(
            text=f"rows are not packed: {type(model).__name__} has no attention here that keeps documents of one row apart; "
            "rows of like length share a pass"
        )
    )
    return alone


class _Probe:
    """Compares logits of a few rows, cut to what fits, when they are packed and when they are alone."""

    def __init__(self, model: "PreTrainedModel", examples: ExampleSource, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        room = min(_PROBE_TOKENS, MAX_CHUNK_LOGITS // model.config.get_text_config().vocab_size)
        last = len(examples) - 1
        self.rows = [_cut(examples[index], max(2, room // 3)) for index in (0, last // 2, last)]

    @torch.no_grad()
    def keeps_apart(self, packs: Packs) -> bool:
        """Tell whether the rows of ``packs`` get the logits that they get alone."""
        self._model.train(False)
        try:
            packed = self._logits(collate_packed(packs, example_ids=range(3), pad_id=self._pad_id))
            alone = [
                self._logits(collate([row], example_ids=[0], pad_id=self._pad_id))[0]
                for row in chain.from_iterable(packs)
            ]
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False  # a model that cannot be told of documents at all
        tolerance = _TOLERANCE.get(packed.dtype, _COARSE_TOLERANCE)
        apart = iter(alone)
        return all(
            _difference(part, next(apart)) <= tolerance
            for row, pack in zip(packed, packs, strict=True)
            for part in row[: sum(map(_length, pack))].split([_length(example) for example in pack])
        )

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self._model(**batch.to(self._model.device).inputs, use_cache=False).logits
        return logits


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far ``found`` (T, V) is from ``expected``, as a part of how much that varies; NaN where one is."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _cut(example: Example, num_tokens: int) -> Example:
    return replace(
        example, input_ids=example.input_ids[:num_tokens], loss_mask=example.loss_mask[:num_tokens]
    )


def _length(example: Example) -> int:
    return len(example.input_ids)


def _told(kind: RowSharing, packing: Packing, emit: EventSink) -> ChosenPacking:
    rows = "one row" if packing.rows == 1 else f"{packing.rows} rows"
    emit(
        Notice(text=f"rows are packed: up to {packing.row_tokens * packing.rows} tokens in {rows} of a pass")
    )
    return ChosenPacking(kind=kind, packing=packing)
