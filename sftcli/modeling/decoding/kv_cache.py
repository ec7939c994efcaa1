"""Key-value caches that rows enter and leave one by one.

Each row has a slot with a length of its own, and new keys are written in place behind it. Nothing is padded on the left,
nothing is copied per token, and a slot that becomes free is filled again while its neighbors go on::

    slot 0   k k k k k k .  .        length 6
    slot 1   k k .  .  .  . .  .     length 2
    slot 2   k k k k .  . .  .       length 4
"""

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from sftcli.modeling.architecture import its_own_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GROWTH = 128  # positions that a slot grows by, at least
_CACHE_NAMES = ("cache", "past_key_values", "state")  # the second in older releases of transformers
_ROPES_OF_LENGTH = {"dynamic", "longrope"}  # rotary positions that the longest text in a pass changes
# Numbers of a config beyond which a layer does not see everything.
_SIGHT = re.compile(r"(window|chunk|block)(_size|_len)?$|^index_topk")


class Rows(Protocol):
    """Rows that are decoded together; the caller keeps their order in step with ``advance`` and ``remove``."""

    @property
    def capacity(self) -> int:
        """The most rows at once."""

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take the next token of every row, (B,) int64, and then new rows; return the logits of what follows.

        Returns:
            (B + number of prompts, V).
        """

    def remove(self, row: int) -> None:
        """Drop ``row``; the last row takes its place."""


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, positions, head size), of which the first ``width`` positions count."""

    is_compileable = False
    is_sliding = False

    def __init__(self, state: "KVCacheState") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for every slot, in the shape and type of what comes first."""
        shapes = [
            (self.state.num_slots, t.shape[1], self.state.room, t.shape[3])
            for t in (key_states, value_states)
        ]
        self.keys, self.values = (
            tensor.new_zeros(shape) for tensor, shape in zip((key_states, value_states), shapes, strict=True)
        )
        self.is_initialized = True

    def fill(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the keys and values of a whole prompt, (1, heads, n, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        count = keys.shape[2]
        self.tensors()[0][slot, :, :count] = keys[0]
        self.tensors()[1][slot, :, :count] = values[0]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,  # noqa: ARG002 - theirs
        **kwargs: object,  # noqa: ARG002 - theirs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one position of every row, (B, heads, 1, head size); return all that the rows hold."""
        keys, values = self.tensors()
        state, rows = self.state, key_states.shape[0]
        keys[state.slots[:rows], :, state.lengths[:rows]] = key_states[:, :, 0]
        values[state.slots[:rows], :, state.lengths[:rows]] = value_states[:, :, 0]
        return keys[:rows, :, : state.width], values[:rows, :, : state.width]

    def grow(self) -> None:
        """Make ``state.room`` positions per slot out of fewer."""
        if self.is_initialized:
            self.keys, self.values = (
                torch.nn.functional.pad(tensor, (0, 0, 0, self.state.room - tensor.shape[2]))
                for tensor in self.tensors()
            )

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` positions of a slot to another."""
        for tensor in self.tensors():
            tensor[target, :, :count] = tensor[source, :, :count]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - theirs
        """Return how many keys a mask must cover and where they start."""
        return self.state.width, 0

    def get_seq_length(self) -> int:
        """Return the width before the step that is under way."""
        return self.state.width - 1

    def get_max_length(self) -> int:
        """Return that there is no maximum."""
        return -1

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of every slot."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class KVCacheState:
    """Which slots are in use and how long their rows are; shared by the layers of a cache."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.size = 0  # rows in use: slots 0 to size - 1
        self.room = GROWTH  # positions that a slot has
        self.width = 0  # of the longest row, the token of the present step included
        self.counts: list[int] = []  # positions of every row, on the host
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.slots = torch.arange(num_slots, device=device)
        self.positions = torch.arange(GROWTH, device=device)

    def grow(self, positions: int) -> bool:
        """Give slots room for ``positions``; return whether they had too little."""
        if positions <= self.room:
            return False
        self.room = max(positions, 2 * self.room)
        self.positions = torch.arange(self.room, device=self.lengths.device)
        return True

    def step(self) -> None:
        """Count one more position of every row."""
        self.lengths[: self.size] += 1
        self.counts = [count + 1 for count in self.counts]

    def add(self, lengths: Sequence[int]) -> None:
        """Count new rows, of ``lengths`` positions, behind the others."""
        self.lengths[self.size : self.size + len(lengths)] = torch.tensor(lengths, device=self.lengths.device)
        self.counts += lengths
        self.size = len(self.counts)

    def drop(self, row: int) -> None:
        """Forget ``row``; the last row takes its number."""
        last = self.size - 1
        self.lengths[row] = self.lengths[last].clone()
        self.counts[row] = self.counts[last]
        self.counts.pop()
        self.size = last

    def mask(self) -> torch.Tensor | None:
        """Return (B, 1, 1, width), true where a row may look, or None where all rows look at everything."""
        if all(count + 1 == self.width for count in self.counts):
            return None
        return (self.positions[: self.width] <= self.lengths[: self.size, None])[:, None, None]


class CachedRows:
    """Rows of a model with plain attention layers, decoded together whatever their lengths."""

    def __init__(self, model: "PreTrainedModel", num_slots: int) -> None:
        if not has_plain_cache(model):
            raise TypeError(f"layers of {type(model).__name__} keep something other than all keys")
        self.model = model
        self.cache_argument = cache_argument(model)
        self.state = KVCacheState(num_slots, model.device)
        self.layers = [KVCacheLayer(self.state) for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=list(self.layers))

    @property
    def capacity(self) -> int:
        """The most rows at once."""
        return self.state.num_slots

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take a step of the rows, and process each prompt separately."""
        logits = [self._step(tokens)] if len(tokens) else []
        return torch.cat([*logits, *(self._admit(prompt) for prompt in prompts)])

    def remove(self, row: int) -> None:
        """Free the slot of ``row``; the last row moves there."""
        last = self.state.size - 1
        if row != last:
            for layer in self.layers:
                layer.copy(last, row, self.state.counts[last])
        self.state.drop(row)

    def _admit(self, prompt: Sequence[int]) -> torch.Tensor:
        cache, logits = _read_prompt(self.model, self.cache_argument, prompt)
        state = self.state
        self._make_room(len(prompt) + 1)
        for layer, read in zip(self.layers, cache.layers, strict=True):
            assert isinstance(read, DynamicLayer)
            assert read.keys is not None
            assert read.values is not None
            layer.fill(state.size, read.keys, read.values)
        state.add([len(prompt)])
        return logits

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        state = self.state
        state.width = max(state.counts) + 1
        self._make_room(state.width)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=state.mask(),
            position_ids=state.lengths[: state.size, None],
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        state.step()
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _make_room(self, positions: int) -> None:
        if self.state.grow(positions):
            for layer in self.layers:
                layer.grow()


class SingleRow:
    """One row at a time, with the model's own cache and called as its ``generate`` calls it: for any other kind of layers."""

    capacity = 1

    def __init__(self, model: "PreTrainedModel", _num_rows: int) -> None:
        self.model = model
        self.cache_argument = cache_argument(model)
        self.text: list[int] = []
        self.cache: object = None

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take a step of the row, or read a prompt."""
        if prompts:
            _forget_lengths(self.model)
            self.cache = self._new_cache()
        self.text = [*prompts[0]] if prompts else [*self.text, *tokens.tolist()]
        positions = torch.arange(len(self.text), device=self.model.device)[None]
        inputs = self.model.prepare_inputs_for_generation(  # type: ignore[operator]
            torch.tensor([self.text], device=self.model.device),
            next_sequence_length=None if prompts else 1,
            is_first_iteration=bool(prompts),
            use_cache=True,
            **{self.cache_argument: self.cache},
            **_taken(self.model, logits_to_keep=1, position_ids=positions),
        )
        output = self.model(**inputs)
        self.cache = output.get(self.cache_argument, self.cache)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def remove(self, row: int) -> None:  # noqa: ARG002 - there is only one
        """Forget the row."""
        self.cache = None

    def _new_cache(self) -> DynamicCache | None:
        """Return an empty cache, or None where the model makes one of a kind of its own."""
        if not self.model._supports_default_dynamic_cache():  # type: ignore[operator]
            return None
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))


class UncachedRow:
    """One row at a time, recomputed for every token: for models without a usable cache."""

    capacity = 1

    def __init__(self, model: "PreTrainedModel", _num_rows: int) -> None:
        self.model = model
        self.text: list[int] = []

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the row with its next token, or a prompt."""
        if prompts:
            _forget_lengths(self.model)
        self.text = [*prompts[0]] if prompts else [*self.text, *tokens.tolist()]
        return uncached_logits(self.model, self.text, last=1)

    def remove(self, row: int) -> None:  # noqa: ARG002 - there is only one
        """Forget the row."""
        self.text = []


def uncached_logits(model: "PreTrainedModel", text: Sequence[int], *, last: int) -> torch.Tensor:
    """Return the logits behind each of the ``last`` tokens of ``text``, (last, V), without a cache."""
    ids = torch.tensor([list(text)], device=model.device)
    with its_own_errors(model, len(text)):
        logits: torch.Tensor = model(
            input_ids=ids, use_cache=False, **_taken(model, logits_to_keep=last)
        ).logits
        return logits[0, -last:]


def has_plain_cache(model: "PreTrainedModel") -> bool:
    """Return whether every layer keeps all keys and values and looks at all of them, and no row changes another one.

    Windows that the cache does not know of are not plain, as the mask of a step shows everything. Nor are rotary positions
    that the longest row of a pass decides.
    """
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and not _limits_of_sight(config)
        and not turns_by_length(model)
    )


def turns_by_length(model: "PreTrainedModel") -> bool:
    """Return whether the longest text so far decides the rotary positions of what comes next, as training would notice."""
    return bool(_kinds_of_rope(model.config.get_text_config(decoder=True)) & _ROPES_OF_LENGTH)


def _limits_of_sight(config: "PretrainedConfig") -> list[str]:
    """Return the keys that let layers see less than they keep; where each layer has a type, the cache knows its window."""
    found = [
        key
        for key, value in vars(config).items()
        if _SIGHT.search(key) and isinstance(value, int) and value > 0
    ]
    has_types = getattr(config, "layer_types", None) is not None
    return [key for key in found if not has_types or key.startswith("index")]


def _kinds_of_rope(config: "PretrainedConfig") -> set[str]:
    """Return the kinds of rotary positions: a config has one for all layers, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}


def _forget_lengths(model: "PreTrainedModel") -> None:
    """Let rotary positions that grow with the longest text so far begin anew: a short text resets them."""
    if "dynamic" in _kinds_of_rope(model.config.get_text_config(decoder=True)):
        uncached_logits(model, [0], last=1)


def _taken(model: "PreTrainedModel", **values: object) -> dict[str, object]:
    """Return those of ``values`` that the model has an argument for."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in values.items() if name in known}


def cache_argument(model: "PreTrainedModel") -> str:
    """Return what the model calls its cache."""
    return next((name for name in _CACHE_NAMES if _taken(model, **{name: None})), _CACHE_NAMES[0])


def _read_prompt(
    model: "PreTrainedModel", argument: str, prompt: Sequence[int]
) -> tuple[DynamicCache, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=torch.tensor([list(prompt)], device=model.device),
        use_cache=True,
        logits_to_keep=1,
        **{argument: cache},
    )
    return cache, output.logits[:, -1]
