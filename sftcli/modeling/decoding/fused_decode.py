"""A pass of a Llama or Qwen2 that decodes, in few large operations.

Decoding is bound by reading the weights, and by the time between operations. Here the projections of a layer that read the
same input are one matrix, laid out for the processor once, and keys and values are turned and written together. Tokens have
no shape but their number, so that rows that go on and prompts that are read share one pass over the weights. It computes
what the model's own ``forward`` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeGuard, cast, get_args

import torch
from torch.nn import Linear
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from sftcli.modeling.decoding.kv_cache import has_plain_cache
from sftcli.modeling.decoding.kv_state import KVCacheState, added
from sftcli.modeling.decoding.products import MakeProduct, Product, are_blocked_in_training, products_of
from sftcli.modeling.decoding.recorded import RecordedSteps, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# (queries (T, heads, head size), what the cache of a layer holds) -> (T, heads * head size)
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Llama = LlamaForCausalLM | Qwen2ForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLayer:
    """Weights of a layer."""

    attention_norm: Product
    qkv: Product
    out: Product
    mlp_norm: Product
    gate_up: Product
    down: Product


class FusedModel:
    """The model as a pass needs it.

    The cache of a layer is (slots, 2, kv heads, room, head size): keys, then values.

    Args:
        model: Whose weights become views of larger tensors.
        goes_on_training: Leave its weights as they are, and hold a copy of those that are laid out.
    """

    def __init__(self, model: Llama, *, goes_on_training: bool = False) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        body = model.model
        self.embedding = body.embed_tokens.weight
        self.rotary = body.rotary_emb
        product, self.dtype = products_of(_linear_weights(model))
        self.head = product(model.lm_head.weight, None)
        norm = partial(_norm, epsilon=config.rms_norm_eps, dtype=self.dtype)
        self.norm = norm(body.norm)
        join = _joined if goes_on_training else _merged
        self.layers = [_fused(layer, product, norm, join) for layer in body.layers]

    def new_caches(self, slots: int, room: int) -> list[torch.Tensor]:
        """Return an empty cache of every layer."""
        shape = (slots, 2, self.kv_heads, room, self.head_size)
        return [self.embedding.new_zeros(shape, dtype=self.dtype) for _ in self.layers]

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        turns: torch.Tensor,
        caches: Sequence[torch.Tensor],
        attend: Attend,
        last: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take tokens, write their keys and values, and return the logits of those after them.

        Args:
            tokens: (T,) int64.
            positions: Of the tokens in their rows, (T,) int64.
            slots: Of the tokens' rows, (T,) int64.
            turns: See ``turns``.
            caches: Of every layer, written in place.
            attend: Looks the queries of a layer up in its cache, where the new keys already are.
            last: The tokens whose successors are asked for, (R,) int64; None for all.

        Returns:
            (R, V).
        """
        cos, sin = self._turned(turns[:, positions])
        places = self._places(slots, positions, caches[0].shape[3])
        hidden = F.embedding(tokens, self.embedding).to(self.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            normed = layer.attention_norm(hidden)
            qkv = layer.qkv(normed).view(len(tokens), -1, self.head_size)
            turned = torch.addcmul(qkv * cos, qkv.roll(self.head_size // 2, -1), sin)
            kept = turned[:, self.heads :].reshape(-1, self.head_size)
            cache.view(-1, self.head_size).index_copy_(0, places, kept)
            hidden = hidden + layer.out(attend(turned[:, : self.heads], cache))
            normed = layer.mlp_norm(hidden)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate).mul_(up))
        if last is not None:
            hidden = hidden[last]
        return self.head(self.norm(hidden))

    def _places(self, slots: torch.Tensor, positions: torch.Tensor, room: int) -> torch.Tensor:
        """Return where keys and values go in a cache seen as (-1, head size), (T * 2 * kv heads,)."""
        parts = torch.arange(2 * self.kv_heads, device=slots.device)
        return ((slots[:, None] * len(parts) + parts) * room + positions[:, None]).view(-1)

    def turns(self, positions: int) -> torch.Tensor:
        """Return the cosines and sines of the first ``positions``, (2, positions, head size)."""
        every = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin = self.rotary(self.embedding[:1, None].to(self.dtype), position_ids=every)
        table = torch.stack((cos[0], sin[0]))
        table[1, :, : self.head_size // 2].neg_()
        return table

    def _turned(self, turns: torch.Tensor) -> torch.Tensor:
        """Return what turns queries and keys by cosine and sine of their positions, (2, T, heads + 2 kv heads, head size).

        A vector x becomes ``x * cos + swapped * sin``, with the halves of x swapped. Values stay what they are, with a cosine
        of one and a sine of zero, so that what a projection gives is turned as a whole.
        """
        shape = (*turns.shape[:2], self.heads + 2 * self.kv_heads, self.head_size)
        every = turns.new_zeros(shape)
        turned = self.heads + self.kv_heads
        every[:, :, :turned] = turns[:, :, None]
        every[0, :, turned:].fill_(1)
        return every


def fuse(model: "PreTrainedModel", *, goes_on_training: bool = False) -> FusedModel | None:
    """Return the faster forward of ``model``, or None if its kind is unsupported. Its weights do not change.

    They become views of larger tensors, so that nothing is held twice. Those of a model that goes on training are left alone: what
    is returned holds a copy of them as they are now, laid out for the processor, and there is none where it has no such layout.
    """
    if can_fuse(model, goes_on_training=goes_on_training):
        with torch.no_grad():
            return FusedModel(model, goes_on_training=goes_on_training)
    return None


def can_fuse(model: "PreTrainedModel", *, goes_on_training: bool = False) -> TypeGuard[Llama]:
    """Return whether ``fuse`` has a forward for ``model``; updates of its weights change nothing about that."""
    is_known = isinstance(model, Llama) and type(model) in get_args(Llama) and _is_plain(model)
    return is_known and (not goes_on_training or are_blocked_in_training(_linear_weights(model)))


def _linear_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, Linear)]


def _is_plain(model: Llama) -> bool:
    """Return whether every projection is an ordinary matrix, without adapters or quantization, and of one kind."""
    config = model.config
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    return (
        has_plain_cache(model)
        and config.hidden_act == "silu"
        and rope in {"default", "linear", "llama3"}  # not those that change with the length of the text
        and len(linear) == 7 * config.num_hidden_layers + 1
        and all(type(module) is Linear for module in linear)
        and not getattr(config, "mlp_bias", False)
        and all(layer.self_attn.o_proj.bias is None for layer in model.model.layers)
        and len({(weight.dtype, weight.device) for weight in model.parameters()}) == 1
    )


def _fused(
    layer: torch.nn.Module,
    product: MakeProduct,
    norm: "Callable[[torch.Tensor | torch.nn.Module], Product]",
    join: Callable[[Sequence[Linear]], torch.Tensor],
) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, torch.nn.Module)
    assert isinstance(mlp, torch.nn.Module)
    qkv = _linear(attention, "q_proj", "k_proj", "v_proj")
    has_bias = qkv[0].bias is not None
    return FusedLayer(
        attention_norm=norm(layer.input_layernorm),
        qkv=product(join(qkv), torch.cat([module.bias for module in qkv]) if has_bias else None),
        out=product(_weight(attention.o_proj), None),
        mlp_norm=norm(layer.post_attention_layernorm),
        gate_up=product(join(_linear(mlp, "gate_proj", "up_proj")), None),
        down=product(_weight(mlp.down_proj), None),
    )


def _linear(module: torch.nn.Module, *names: str) -> list[Linear]:
    return [cast("Linear", getattr(module, name)) for name in names]


def _norm(module: "torch.Tensor | torch.nn.Module", epsilon: float, dtype: torch.dtype) -> Product:
    """Return what norms rows. On CUDA that is a kernel of torch, elsewhere nine operations of it, and here four.

    ``x / sqrt(mean(x ** 2) + eps)`` is ``sqrt(D) x / hypot(|x|, sqrt(D eps))``, and the first factor is in the weight.
    """
    weight = _weight(module)
    width = len(weight)
    if weight.device.type == "cuda":
        return partial(F.rms_norm, normalized_shape=(width,), weight=weight, eps=epsilon)
    scale = weight.float() * width**0.5
    least = torch.tensor((width * epsilon) ** 0.5, device=weight.device)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        normed: torch.Tensor = rows / length.hypot_(least)
        return normed.mul_(scale).to(dtype)

    return norm


def _weight(module: "torch.Tensor | torch.nn.Module") -> torch.Tensor:
    return cast("Linear", module).weight


def _joined(modules: Sequence[Linear]) -> torch.Tensor:
    """Return the weights of ``modules`` one below the other."""
    return torch.cat([module.weight for module in modules])


def _merged(modules: Sequence[Linear]) -> torch.Tensor:
    """Return what ``_joined`` does; each weight becomes a part of it."""
    whole = _joined(modules)
    begin = 0
    for module in modules:
        end = begin + len(module.weight)
        module.weight.data = whole[begin:end]
        begin = end
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptRead:
    """A prompt in a pass: ``tokens`` of it are new, behind what its slot already holds."""

    slot: int
    begin: int  # among the tokens of the pass
    tokens: int
    length: int  # of the whole prompt
    mask: (
        torch.Tensor | None
    )  # (tokens, length), what to add to the scores; None where the whole prompt is new


class FusedRows:
    """Rows of a model: running and new rows share one pass over the weights.

    What all prompts begin with, such as a system message, is read once and copied.
    """

    def __init__(
        self,
        fused: FusedModel,
        num_slots: int,
        prefix: Sequence[int] = (),
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self.fused = fused
        self.prefix = prefix
        self.state = KVCacheState(num_slots, fused.embedding.device)
        self.steps = RecordedSteps(recorder, self.state, lambda tokens: self._run(tokens, [], []))
        self.turns = fused.turns(self.state.room)
        # One more slot holds the prefix.
        self.caches = fused.new_caches(num_slots + bool(prefix), self.state.room)
        self._has_prefix = False

    @property
    def capacity(self) -> int:
        """The most rows at once."""
        return self.state.num_slots

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take the next token of every row and the prompts of new rows, in one pass."""
        state, count = self.state, self.state.size
        if prompts:
            self._begin_with_prefix(len(prompts))
        known = len(self.prefix)
        reads, begin = [], count
        for slot, prompt in enumerate(prompts, count):
            reads.append(self._read(slot, begin, len(prompt), known))
            begin += len(prompt) - known
        state.width = max(state.counts, default=0) + 1
        self._make_room(max([state.width, *(read.length + 1 for read in reads)]))
        if prompts:
            logits = self._run(tokens, [prompt[known:] for prompt in prompts], reads)
        else:
            logits = self.steps(tokens)
        state.step()
        state.add([read.length for read in reads])
        return logits

    def remove(self, row: int) -> None:
        """Free the slot of ``row``; the last row moves there."""
        last, count = self.state.size - 1, self.state.counts[-1]
        if row != last:
            for cache in self.caches:
                cache[row, :, :, :count] = cache[last, :, :, :count]
        self.state.drop(row)

    def _run(
        self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]], reads: Sequence[_PromptRead]
    ) -> torch.Tensor:
        """Run the model on one token of every row and on what is new in ``prompts``; (rows + prompts, V)."""
        count, device = len(tokens), self.state.lengths.device
        positions, slots = [self.state.lengths[:count]], [self.state.slots[:count]]
        for read in reads:
            positions.append(torch.arange(read.length - read.tokens, read.length, device=device))
            slots.append(torch.full((read.tokens,), read.slot, device=device))
        last = [*range(count), *(read.begin + read.tokens - 1 for read in reads)]
        every = [tokens, *(torch.tensor(list(prompt), device=device) for prompt in prompts)]
        mask = self._mask()

        def attend(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            seen = [self._look_back(query[:count], cache, mask)] if count else []
            seen += [self._look_within(query, cache, read) for read in reads]
            return torch.cat(seen) if len(seen) > 1 else seen[0]

        return self.fused.run(
            torch.cat(every),
            torch.cat(positions),
            torch.cat(slots),
            self.turns,
            self.caches,
            attend,
            torch.tensor(last, device=device) if reads else None,
        )

    def _look_back(self, query: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Let the one query of every row see its row, (B, heads, head size) -> (B, heads * head size).

        Heads that share keys are queries of one head, so that no key is copied.
        """
        count, width = len(query), self.state.width
        return F.scaled_dot_product_attention(
            query.view(count, self.fused.kv_heads, -1, self.fused.head_size),
            self._parts(cache, 0, count, width),
            self._parts(cache, 1, count, width),
            attn_mask=mask,
        ).reshape(count, -1)

    @staticmethod
    def _parts(cache: torch.Tensor, part: int, count: int, width: int) -> torch.Tensor:
        """Return ``cache[:count, part, :, :width]``, as one operation."""
        slots, parts, *others = cache.stride()
        size = (count, cache.shape[2], width, cache.shape[4])
        return cache.as_strided(size, (slots, *others), part * parts)

    def _look_within(self, query: torch.Tensor, cache: torch.Tensor, read: _PromptRead) -> torch.Tensor:
        """Let the queries of a prompt see it up to themselves, (n, heads, head size) -> (n, heads * head size).

        Heads that share keys are heads of one batch entry, and see the same keys.
        """
        fused = self.fused
        mine = query[read.begin : read.begin + read.tokens]
        mine = mine.view(read.tokens, fused.kv_heads, -1, fused.head_size).permute(1, 2, 0, 3)
        keys, values = (
            cache[read.slot, part, :, None, : read.length].expand(-1, mine.shape[1], -1, -1)
            for part in (0, 1)
        )
        seen = F.scaled_dot_product_attention(
            mine, keys, values, attn_mask=read.mask, is_causal=read.mask is None
        )
        return seen.permute(2, 0, 1, 3).reshape(read.tokens, -1)

    def _mask(self) -> torch.Tensor | None:
        """Return what to add to the scores of rows that go on, in the type of the scores."""
        mask = self.state.mask()
        return None if mask is None else added(mask, self.fused.dtype)

    def _read(self, slot: int, begin: int, length: int, known: int) -> _PromptRead:
        tokens, mask = length - known, None
        if known:
            device = self.state.lengths.device
            visible = torch.ones(tokens, length, dtype=torch.bool, device=device).tril(known)
            mask = added(visible, self.fused.dtype)
        return _PromptRead(slot=slot, begin=begin, tokens=tokens, length=length, mask=mask)

    def _begin_with_prefix(self, count: int) -> None:
        """Put the prefix into the slots of the next ``count`` rows, having read it if it was not yet."""
        known = len(self.prefix)
        if not known:
            return
        state, slot = self.state, self.state.num_slots
        if not self._has_prefix:
            self._make_room(known + 1)
            self._run(state.slots[:0], [self.prefix], [self._read(slot, 0, known, 0)])
            self._has_prefix = True
        for cache in self.caches:
            cache[state.size : state.size + count, :, :, :known] = cache[slot, :, :, :known]

    def _make_room(self, positions: int) -> None:
        if self.state.grow(positions):
            self.steps.forget()
            self.turns = self.fused.turns(self.state.room)
            for layer, cache in enumerate(self.caches):  # one after the other, so that few exist twice
                self.caches[layer] = F.pad(cache, (0, 0, 0, self.state.room - cache.shape[3]))
