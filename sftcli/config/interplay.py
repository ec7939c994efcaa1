"""What happens to inherited values when a later source says something that they do not go with.

Precedence decides between values of one key. It does not help where a preset's value of one key makes no sense
next to the user's value of another: the held-out rows of a preset say nothing about the user's own data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

from sftcli.config.layers import Entry, Fields, Layer, winning
from sftcli.config.schema.adapter import ADAPTER_LEARNING_RATE, AdapterKind

# A key set in a later source ends the values that earlier sources gave to these.
_ENDS: Mapping[str, Sequence[str]] = {
    "model.name": ("model.revision", "model.tokenizer", "adapter.start_from"),
    "data.sources": ("data.heldout_sources", "data.leave_out"),
    "data.heldout_fraction": ("data.heldout_sources",),
    "training.epochs": ("training.max_steps",),
    "training.max_minutes": ("training.max_steps", "training.epochs"),
    "training.warmup_fraction": ("training.warmup_steps",),
}
_BATCH, _MICRO_BATCH = "training.batch_size", "training.micro_batch_size"
_STEPS, _WARMUP = "training.max_steps", "training.warmup_steps"
_ADAPTER, _RATE = "adapter.kind", "training.learning_rate"
_ADAPTERS = frozenset(kind.value for kind in AdapterKind if kind is not AdapterKind.NONE)


def settle(layers: Sequence[Layer], fields: Fields) -> Sequence[Layer]:
    """Return ``layers`` without inherited values that a later source has made meaningless.

    What users wrote themselves is not changed to make it fit: that is a conflict, and validation refuses it.
    """
    settled = [_without(layer, _ended_by(layer, layers[index + 1 :])) for index, layer in enumerate(layers)]
    winners = winning(settled)
    if _is_outgrown(settled, _WARMUP, winners.get(_STEPS), fields):
        settled = [_without(layer, {_WARMUP}) for layer in settled]
    batch = winners.get(_BATCH)
    if batch is not None and _is_outgrown(settled, _MICRO_BATCH, batch, fields):
        lowered = replace(batch, key=_MICRO_BATCH, origin=f"limited by {batch.origin}")
        settled.append(Layer(entries={_MICRO_BATCH: lowered}))
    adapter = winners.get(_ADAPTER)
    if adapter is not None and adapter.value in _ADAPTERS and _is_inherited(settled, _RATE, _ADAPTER):
        suited = replace(
            adapter, key=_RATE, value=ADAPTER_LEARNING_RATE, origin=f"goes with {adapter.origin}"
        )
        settled.append(Layer(entries={_RATE: suited}))
    return settled


def _is_inherited(layers: Sequence[Layer], key: str, other: str) -> bool:
    """Return whether ``key`` is a default, or of a preset that knew nothing of what ``other`` is set to later."""
    source = _source(layers, key)
    return source < 0 or (layers[source].is_preset and source < _source(layers, other))


def _source(layers: Sequence[Layer], key: str) -> int:
    """Return the index of the layer whose value of ``key`` counts, -1 for the default."""
    return max((index for index, layer in enumerate(layers) if key in layer.entries), default=-1)


def _ended_by(layer: Layer, later: Sequence[Layer]) -> set[str]:
    ended = {ended for key in winning(later) for ended in _ENDS.get(key, ())}
    # A source that names a tokenizer and no model does not say whose tokenizer it is: the later model's.
    return ended if "model.name" in layer.entries else ended - {"model.tokenizer"}


def _without(layer: Layer, keys: set[str]) -> Layer:
    return replace(layer, entries={key: entry for key, entry in layer.entries.items() if key not in keys})


def _is_outgrown(layers: Sequence[Layer], key: str, limit: Entry | None, fields: Fields) -> bool:
    """Return whether ``key`` is inherited and above ``limit``, the value of another key from a later source."""
    if limit is None or not _is_inherited(layers, key, limit.key):
        return False
    entry = winning(layers).get(key)
    value: object = fields[key].default if entry is None else entry.value
    # A limit that is itself wrong is left for validation to report, and only it.
    return _is_whole(limit.value) and _is_whole(value) and value > limit.value >= 1


def _is_whole(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
