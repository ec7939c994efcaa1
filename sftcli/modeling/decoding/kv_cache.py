"""Key-value caches that rows enter and leave one by one.

Each row has a slot with a length of its own, and new keys are written in place behind it. Nothing is padded on the left,
nothing is copied per token, and a slot that becomes free is filled again while its neighbors go on::

    slot 0   k k k k k k .  .        length 6
    slot 1   k k .  .  .  . .  .     length 2
    slot 2   k k k k .  . .  .       length 4
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWTH = 128  # positions that a slot grows by, at least


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
    """One row at a time, with the model's own cache: for models whose layers keep something other than all keys."""

    capacity = 1

    def __init__(self, model: "PreTrainedModel", _num_rows: int) -> None:
        self.model = model
        self.cache_argument = cache_argument(model)
        self.cache: DynamicCache | None = None

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take a step of the row, or read a prompt."""
        logits: torch.Tensor
        if prompts:
            self.cache, logits = _read_prompt(self.model, self.cache_argument, prompts[0])
            return logits
        output = self.model(input_ids=tokens[:, None], use_cache=True, **{self.cache_argument: self.cache})
        logits = output.logits[:, -1]
        return logits

    def remove(self, row: int) -> None:  # noqa: ARG002 - there is only one
        """Forget the row."""
        self.cache = None


class UncachedRow:
    """One row at a time, recomputed for every token: for models without a usable cache."""

    capacity = 1

    def __init__(self, model: "PreTrainedModel", _num_rows: int) -> None:
        self.model = model
        self.text: list[int] = []

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the row with its next token, or a prompt."""
        self.text = [*prompts[0]] if prompts else [*self.text, *tokens.tolist()]
        return uncached_logits(self.model, self.text)

    def remove(self, row: int) -> None:  # noqa: ARG002 - there is only one
        """Forget the row."""
        self.text = []


def uncached_logits(model: "PreTrainedModel", text: Sequence[int]) -> torch.Tensor:
    """Return the logits of the token after ``text``, (1, V), without a cache."""
    ids = torch.tensor([list(text)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, -1]
    return logits


def has_plain_cache(model: "PreTrainedModel") -> bool:
    """Return whether every layer keeps all keys and values of the past and nothing else."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def cache_argument(model: "PreTrainedModel") -> str:
    """Return what this release of transformers calls the cache: ``cache``, or ``past_key_values`` in older ones."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


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
