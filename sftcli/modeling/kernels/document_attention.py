"""Attention for rows that hold several documents: each document separately, without a mask and without padding.

Everything else in a decoder works on tokens one by one, so one long row of documents makes the largest matrix products,
and attention costs what the documents cost apart.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sftcli.modeling.attention import attention_of, is_named, set_attention
from sftcli.modeling.config_values import config_value
from sftcli.modeling.kernels.cpu_attention import CpuAttention, can_attend, split_documents
from sftcli.modeling.kernels.state_kernels import has_convolutions
from sftcli.modeling.kernels.told_positions import spare_search
from sftcli.runtime import applied, body_of

NAME = "sft_documents"  # what transformers knows this attention as
_PLAIN = "sdpa"
_PLAIN_ATTENTION = cast("Callable[..., tuple[torch.Tensor, None]]", sdpa_attention_forward)
_PLAIN_MASK = cast("Callable[..., torch.Tensor | None]", sdpa_mask)
_MOST_HEAD_DIM = 256  # that flash kernels can do


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one attention call of a model."""

    module: torch.nn.Module
    window: int | None
    dropout: float
    has_mask: bool


@dataclass(frozen=True, slots=True)
class Overheard:
    """The recorded calls of attention by document."""

    calls: list[Call] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)  # windows for which no mask was made

    @property
    def is_complete(self) -> bool:
        """Whether every window that no mask says was told to attention itself, by some module."""
        return self.left_out <= {call.window for call in self.calls}


@dataclass(slots=True)
class _Told:
    """What the newest pass of a model was told of the documents of its row, by name.

    Some layers do not hand it on to their attention. It stays until the next pass, since layers are computed again in the
    backward pass, perhaps in another thread.
    """

    newest: Mapping[str, Any] = field(default_factory=dict)
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
    if is_named(model) or attention_of(model) != _PLAIN:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    set_attention(model, NAME)
    _hear(model)
    return attention_of(model) == NAME


def attend_as_before(model: PreTrainedModel) -> None:
    """Undo ``attend_by_document``."""
    if attention_of(model) == NAME:
        set_attention(model, _PLAIN)
        if (told := _told.get(model)) is not None and told.handle is not None:
            told.handle.remove()
        for module in model.modules():
            _told.pop(module, None)


def _hear(model: PreTrainedModel) -> None:
    """Remember what ``model`` is told of documents, for modules that do not get it, and tell convolutions where they begin."""
    told, names = _Told(), ("cu_seq_lens_q", "max_length_q")
    # What keeps a state along the row is told by the number of each token's document.
    has_state = has_convolutions(model)
    # Whose masks are made all the same, and have to keep documents apart.
    is_chunked = config_value(model, "attention_chunk_size") is not None

    def hear(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401 - torch's
        told.newest = {name: kwargs.get(name) for name in names}
        bounds: torch.Tensor | None = told.newest[names[0]]
        if bounds is not None and not is_chunked:
            spare_search(kwargs.get("position_ids"))
        if bounds is None or not has_state:
            return args, kwargs
        numbers = torch.arange(len(bounds) - 1, dtype=torch.int32, device=bounds.device)
        return args, kwargs | {"seq_idx": numbers.repeat_interleave(bounds.diff())[None]}

    told.handle = body_of(model).register_forward_pre_hook(hear, with_kwargs=True)
    for module in model.modules():
        _told[module] = told


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
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **rest: object,
) -> tuple[torch.Tensor, None]:
    """Return (B, T, heads, D) for ``query`` (B, heads, T, D); with ``cu_seq_lens_q`` there is one row."""

    def one(*parts: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return _PLAIN_ATTENTION(module, *parts, mask, dropout=dropout, scaling=scaling, **rest)[0]

    if cu_seq_lens_q is None and (told := _told.get(module)) is not None:
        cu_seq_lens_q, max_length_q = told.newest.get("cu_seq_lens_q"), told.newest.get("max_length_q")
    if (found := _listening.get()) is not None:
        has_mask = attention_mask is not None
        call = Call(module=module, window=sliding_window, dropout=dropout, has_mask=has_mask)
        found.calls.append(call)
    if attention_mask is not None or query.shape[2] != key.shape[2]:  # the model or a cache says what is seen
        return one(query, key, value, mask=attention_mask), None
    if cu_seq_lens_q is None:
        return one(query, key, value, mask=_window(query, sliding_window)), None
    if not dropout and (varlen := _varlen(query, value)) is not None:
        rows = (part[0].transpose(0, 1) for part in (query, key, value))
        # transformers counts the query itself, the kernel what is left and right of it; -1 is no bound.
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen(*rows, *bounds, scale=scaling, window_size=window, enable_gqa=True)[None], None
    lengths: list[int] = cu_seq_lens_q.diff().tolist()
    is_whole = sliding_window is None or max(lengths) <= sliding_window
    if not dropout and is_whole and can_attend(query, key, value):
        return applied(CpuAttention, query, key, value, lengths, scaling), None
    documents = split_documents(lengths, query, key, value)
    return torch.cat(
        [one(*parts, mask=_window(parts[0], sliding_window)) for parts in documents], dim=1
    ), None


def _window(query: torch.Tensor, size: int | None) -> torch.Tensor | None:
    """Return which of the last ``size`` keys each query sees, (1, 1, T, T); None where causality says it all."""
    width = query.shape[2]
    if size is None or width <= size:
        return None
    place = torch.arange(width, device=query.device)
    back = place[:, None] - place[None, :]
    return ((back >= 0) & (back < size))[None, None]


def _varlen(query: torch.Tensor, value: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Return torch's kernel for rows of documents, where it can do these."""
    is_fit = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return _varlen_kernel() if is_fit and query.shape[-1] == value.shape[-1] <= _MOST_HEAD_DIM else None


@cache
def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    # Its first release knew neither windows nor grouped heads.
    wanted = {"scale", "window_size", "enable_gqa"}
    knows = inspect.signature(varlen_attn).parameters.keys()
    return cast("Callable[..., torch.Tensor]", varlen_attn) if wanted <= knows else None
