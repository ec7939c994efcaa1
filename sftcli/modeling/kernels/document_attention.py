"""Attention for rows that hold several documents: each document separately, without a mask and without padding.

Everything else in a decoder works on tokens one by one, so one long row of documents makes the largest matrix products,
and attention costs what the documents cost apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sftcli.modeling.attention import attention_of, is_named, set_attention
from sftcli.modeling.config_values import config_value
from sftcli.modeling.kernels.cpu_attention import CpuAttention, can_attend, split_documents
from sftcli.modeling.kernels.flash_switch import switched_to
from sftcli.modeling.kernels.shared_rows import Neighbors, by_head, by_position, told_parts
from sftcli.modeling.kernels.state_kernels import has_convolutions
from sftcli.modeling.kernels.told_positions import spare_search
from sftcli.modeling.kernels.varlen import Asked, Varlen, varlen_on
from sftcli.runtime import applied, body_of

NAME = "sft_documents"  # what transformers knows this attention as
PLAIN = "sdpa"  # which it is for rows of one document each
_PLAIN_ATTENTION = cast("Callable[..., tuple[torch.Tensor, None]]", sdpa_attention_forward)
_PLAIN_MASK = cast("Callable[..., torch.Tensor | None]", sdpa_mask)
_LENGTHS = "document_lengths"  # what ``Documents.inputs`` calls them
_VARLEN, _BY_DOCUMENT = "varlen", "by document"  # one kernel for all, one after the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attention call of a model."""

    module: torch.nn.Module
    asked: Asked
    has_mask: bool
    kernel: Varlen | None  # for the documents of the row, where it has some and the device such a kernel
    lacks: str | None  # what that cannot do of it, in words

    @property
    def window(self) -> int | None:
        """How many keys a query sees, itself included; None where it sees all before it."""
        return self.asked.window

    @property
    def dropout(self) -> float:
        """The part of the weights that is dropped."""
        return self.asked.dropout


@dataclass(frozen=True, slots=True)
class Overheard:
    """The recorded calls of attention by document."""

    calls: list[Call] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)  # windows for which no mask was made

    @property
    def is_complete(self) -> bool:
        """Whether every window that no mask says was told to attention itself, by some module."""
        return self.left_out <= {call.window for call in self.calls}

    @property
    def lacks(self) -> str | None:
        """Why some call had to go document by document where the device has a kernel for all, in words."""
        return next((call.lacks for call in self.calls if call.lacks), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The documents of the row of a pass, and the kernel for them; nothing of it waits for the device in a layer."""

    bounds: torch.Tensor
    lengths: tuple[int, ...]
    longest: int
    kernel: Varlen | None

    @staticmethod
    def of(bounds: torch.Tensor, lengths: tuple[int, ...] | None) -> "_Row":
        """Return the row of documents between ``bounds``; without ``lengths`` it waits for the device."""
        if lengths is None:
            lengths = tuple(bounds.diff().tolist())
        return _Row(bounds=bounds, lengths=lengths, longest=max(lengths), kernel=varlen_on(bounds.device))


@dataclass(slots=True)
class _Told:
    """What the newest pass of a model was told of the documents of its row, and what computed attention so far.

    Some layers do not hand it on to their attention. It stays until the next pass, since layers are computed again in the
    backward pass, perhaps in another thread.
    """

    newest: _Row | None = None
    neighbors: Neighbors | None = None  # that this process shares rows with
    is_part: bool = False  # whether the pass has a part of the positions of its rows
    by: set[str] = field(default_factory=set)
    handle: torch.utils.hooks.RemovableHandle | None = None


_told: "WeakKeyDictionary[torch.nn.Module, _Told]" = WeakKeyDictionary()  # by each module of a model
_listening: ContextVar[Overheard | None] = ContextVar("listening", default=None)


@contextmanager
def overheard() -> Iterator[Overheard]:
    """Record the attention calls by document inside the block."""
    found = Overheard()
    token = _listening.set(found)
    try:
        yield found
    finally:
        _listening.reset(token)


def attend_by_document(model: PreTrainedModel) -> bool:
    """Let ``model`` attend document by document if their bounds are given, and as before otherwise.

    Returns false, and changes nothing, where it does not use torch's attention through transformers' interface, or a user
    named the attention that it uses.
    """
    if is_named(model) or attention_of(model) != PLAIN:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    set_attention(model, NAME)
    _hear(model)
    return attends_by_document(model)


def attends_by_document(model: PreTrainedModel) -> bool:
    """Return whether ``model`` has been let attend document by document."""
    return attention_of(model) == NAME


def attend_together(model: PreTrainedModel, neighbors: Neighbors) -> None:
    """Let ``model``, which attends by document, bring the parts of rows together that its process and its ``neighbors`` have."""
    _told[model].neighbors = neighbors


def attend_as_before(model: PreTrainedModel) -> None:
    """Undo ``attend_by_document``."""
    if attends_by_document(model):
        set_attention(model, PLAIN)
        if (told := _told.get(model)) is not None and told.handle is not None:
            told.handle.remove()
        for module in model.modules():
            _told.pop(module, None)


def computed_by(model: PreTrainedModel) -> str:
    """Return what has computed the attention of packed rows since ``attend_by_document``, in a few words.

    That is "varlen", torch's kernel, with the name of what it was switched to, or "by document", or both in turn.
    """
    told = _told.get(model)
    by = (told.by if told else set()) or {_BY_DOCUMENT}  # fused layers, on a CPU, attend by themselves
    flash = switched_to()
    return " and ".join(f"{name} {flash}" if flash and name == _VARLEN else name for name in sorted(by))


def _hear(model: PreTrainedModel) -> None:
    """Remember what ``model`` is told of documents, for modules that do not get it, and tell convolutions where they begin."""
    told = _Told()
    # What keeps a state along the row is told by the number of each token's document.
    has_state = has_convolutions(model)
    # Whose masks are made all the same, and have to keep documents apart.
    is_chunked = config_value(model, "attention_chunk_size") is not None

    def hear(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401 - torch's
        bounds: torch.Tensor | None = kwargs.get("cu_seq_lens_q")
        lengths: tuple[int, ...] | None = kwargs.pop(_LENGTHS, None)  # which only this attention wants
        told.newest = None if bounds is None else _Row.of(bounds, lengths)
        told.is_part = told_parts(kwargs, told.neighbors)
        if (bounds is not None and not is_chunked) or told.is_part:
            spare_search(kwargs.get("position_ids"))
        if told.newest is None or not has_state:
            return args, kwargs
        return args, kwargs | {"seq_idx": _numbers(told.newest)[None]}

    told.handle = body_of(model).register_forward_pre_hook(hear, with_kwargs=True)
    for module in model.modules():
        _told[module] = told


def _numbers(row: _Row) -> torch.Tensor:
    """Return the number of each token's document, (T,) int32."""
    numbers = torch.arange(len(row.lengths), dtype=torch.int32, device=row.bounds.device)
    return numbers.repeat_interleave(row.bounds.diff(), output_size=sum(row.lengths))


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: PretrainedConfig | None = None,
    local_size: int | None = None,
    **rest: object,
) -> torch.Tensor | None:
    """Return no mask where causality, windows and the documents of one row, which ``_attend`` sees to, say it all."""
    is_chunked = getattr(config, "attention_chunk_size", None) is not None
    is_whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    is_one = batch_size == 1 or allow_is_causal_skip  # several rows are not told where their documents are
    if is_whole and is_one and attention_mask is None and not (use_vmap or is_chunked):
        if (found := _listening.get()) is not None and local_size is not None and _has_windows(config):
            found.left_out.add(local_size)
        return None
    return _PLAIN_MASK(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        config=config,
        local_size=local_size,
        **rest,
    )


def _has_windows(config: PretrainedConfig | None) -> bool:
    """Return whether a layer may see through a window; some models make the mask of one for nobody."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or set(kinds) != {"full_attention"}


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,  # noqa: ANN401 - what each family passes on
) -> tuple[torch.Tensor, None]:
    """Return (B, T, heads, D) for ``query`` (B, heads, T, D), of a part of the positions where the pass has no more."""
    told = _told.get(module)
    if told is None or told.neighbors is None or not told.is_part:
        return _attend_rows(module, told, query, key, value, attention_mask, **arguments), None
    if attention_mask is not None:
        raise ValueError("a mask for a part of the positions does not say what they see of the others")
    query, key, value = by_head(told.neighbors, query, key, value)
    groups = query.shape[1] // key.shape[1]
    plain = SimpleNamespace(num_key_value_groups=groups, is_causal=getattr(module, "is_causal", True))
    seen = _attend_rows(plain, told, query, key, value, None, **arguments)
    return by_position(told.neighbors, seen), None


def _attend_rows(
    module: Any,  # noqa: ANN401 - or what tells as much of its heads
    told: _Told | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **rest: object,
) -> torch.Tensor:
    """Return (B, T, heads, D) for ``query`` (B, heads, T, D) of whole rows; with ``cu_seq_lens_q`` there is one row."""

    def one(*parts: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return _PLAIN_ATTENTION(module, *parts, mask, dropout=dropout, scaling=scaling, **rest)[0]

    row = _row_of(told, cu_seq_lens_q, document_lengths)
    is_open = (
        attention_mask is None and query.shape[2] == key.shape[2]
    )  # else the model or a cache says what is seen
    asked = Asked.of(query, key, value, scale=scaling, window=sliding_window, dropout=dropout)
    kernel = row.kernel if row is not None and is_open else None
    lacks = None if kernel is None else kernel.lacks(asked)
    if (found := _listening.get()) is not None:
        has_mask = attention_mask is not None
        found.calls.append(Call(module=module, asked=asked, has_mask=has_mask, kernel=kernel, lacks=lacks))
    if not is_open:
        return one(query, key, value, mask=attention_mask)
    if row is None:
        return one(query, key, value, mask=_window(query, sliding_window))
    fits = kernel is not None and lacks is None
    if told is not None:
        told.by.add(_VARLEN if fits else _BY_DOCUMENT)
    if kernel is not None and fits:
        return kernel.attend(query, key, value, bounds=row.bounds, longest=row.longest, asked=asked)
    is_whole = sliding_window is None or row.longest <= sliding_window
    if not dropout and is_whole and can_attend(query, key, value):
        return applied(CpuAttention, query, key, value, row.lengths, scaling)
    documents = split_documents(row.lengths, query, key, value)
    return torch.cat([one(*parts, mask=_window(parts[0], sliding_window)) for parts in documents], dim=1)


def _row_of(told: _Told | None, bounds: torch.Tensor | None, lengths: tuple[int, ...] | None) -> _Row | None:
    """Return the row of documents that an attention is in: by ``bounds`` that it was given, or by what its model was told."""
    newest = None if told is None else told.newest
    if bounds is None or (newest is not None and newest.bounds is bounds):
        return newest
    return _Row.of(bounds, lengths)


def _window(query: torch.Tensor, size: int | None) -> torch.Tensor | None:
    """Return which of the last ``size`` keys each query sees, (1, 1, T, T); None where causality says it all."""
    width = query.shape[2]
    if size is None or width <= size:
        return None
    place = torch.arange(width, device=query.device)
    back = place[:, None] - place[None, :]
    return ((back >= 0) & (back < size))[None, None]
