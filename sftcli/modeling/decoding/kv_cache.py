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

from sftcli.modeling.architecture import its_own_errors
from sftcli.modeling.attention import attention_of
from sftcli.modeling.decoding.kv_state import KVCacheState, added
from sftcli.modeling.decoding.recorded import RecordedSteps, Recorder
from sftcli.modeling.decoding.windows import TYPES, has_types, windows_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CACHE_NAMES = ("cache", "past_key_values", "state")  # the second in older releases of transformers
_ROPES_OF_LENGTH = {"dynamic", "longrope"}  # rotary positions that the longest text in a pass changes


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


class CachedRows:
    """Rows of a model whose layers have keys and values, decoded together whatever their lengths.

    Layers with a window keep all of them, too, and masks say which are seen.
    """

    def __init__(self, model: "PreTrainedModel", num_slots: int, recorder: Recorder | None = None) -> None:
        windows = windows_of(model)
        if windows is None or turns_by_length(model):
            raise TypeError(f"layers of {type(model).__name__} keep something other than keys")
        self.model = model
        self.windows = windows
        self.adds_mask = attention_of(model) == "eager"
        self.cache_argument = cache_argument(model)
        self.state = KVCacheState(num_slots, model.device)
        self.steps = RecordedSteps(recorder, self.state, self._run)
        self.layers = [KVCacheLayer(self.state) for _ in windows]
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
        logits = self.steps(tokens)
        state.step()
        return logits

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._mask(),
            position_ids=self.state.lengths[: self.state.size, None],
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _mask(self) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """Return what rows may look at; of each type of layer, where some have a window."""
        masks = {window: self._form(self.state.mask(window)) for window in {*self.windows}}
        if not any(self.windows):
            return masks[0]
        if not has_types(self.model):
            (mask,) = masks.values()
            return mask
        full, sliding = TYPES.values()
        return {sliding if window else full: mask for window, mask in masks.items()}

    def _form(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Return ``mask`` as the attention of the model takes it: its own, in steps, adds it to the scores."""
        return mask if mask is None or not self.adds_mask else added(mask, self.model.dtype)

    def _make_room(self, positions: int) -> None:
        if self.state.grow(positions):
            self.steps.forget()
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
    """Return whether every layer looks at all keys and values, and no row changes another one.

    Rotary positions that the longest row of a pass decides would.
    """
    windows = windows_of(model)
    return windows is not None and not any(windows) and not turns_by_length(model)


def turns_by_length(model: "PreTrainedModel") -> bool:
    """Return whether the longest text so far decides the rotary positions of what comes next, as training would notice."""
    return bool(_kinds_of_rope(model.config.get_text_config(decoder=True)) & _ROPES_OF_LENGTH)


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
    cache = DynamicCache()  # of no configuration, so that layers with a window keep everything
    output = model(
        input_ids=torch.tensor([list(prompt)], device=model.device),
        use_cache=True,
        logits_to_keep=1,
        **{argument: cache},
    )
    return cache, output.logits[:, -1]
