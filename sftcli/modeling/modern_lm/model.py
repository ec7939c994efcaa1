"""The decoder of the Modern LLM pipeline as a transformers model.

Two peculiarities are kept because weights were trained with them: rotary cosines and sines are laid out interleaved
while the rotation is half-split, and with attention sinks on, queries stand ``num_attention_sinks`` positions further
on than the keys of the same tokens.
"""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from sftcli.modeling.modern_lm.config import MODEL_TYPE, ModernLMConfig


def visible_keys(positions: Tensor, attention_mask: Tensor | None, *, past: int, sinks: int) -> Tensor | None:
    """Return which keys each query sees, (B or 1, 1, T, sinks + past + T), or None where plain causality says it all.

    Documents in one row are told by positions that do not go on by one; they see the sinks and themselves.
    """
    if (
        attention_mask is not None and attention_mask.dim() == 4
    ):  # the caller says all of it: (B, 1, T, past + T)
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        return functional.pad(seen, (sinks, 0), value=True)
    width = positions.shape[1]
    packed = past == 0 and bool((positions.diff(dim=1) != 1).any())
    if attention_mask is None and not packed and not sinks and (past == 0 or width == 1):
        return None
    place = torch.arange(past + width, device=positions.device)
    queries = place[past:]
    seen = (place[None, :] <= queries[:, None])[None]
    if packed:
        starts = functional.pad(positions.diff(dim=1) != 1, (1, 0))
        document = starts.cumsum(dim=1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    if attention_mask is not None:
        # A padded query sees itself, so that no row of scores is empty.
        seen = seen & (attention_mask[:, None, :].bool() | (place[None, :] == queries[:, None])[None])
    seen = seen[:, None]
    return functional.pad(seen, (sinks, 0), value=True) if sinks else seen


# Newer releases of transformers call the field "cache", older ones "past_key_values".
_CACHE_FIELD = next(
    field.name
    for field in dataclasses.fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)


class ModernRMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight``, in the dtype of ``x``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _rotate(x: Tensor, positions: Tensor, config: ModernLMConfig) -> Tensor:
    """Rotate ``x`` (B, heads, T, head_dim) to ``positions`` (B or 1, T)."""
    pairs = torch.arange(0, config.head_dim, 2, device=x.device, dtype=torch.float32)
    frequency = config.rotary_base ** (-pairs / config.head_dim)
    angles = positions[..., None].float() * frequency
    if config.rotary_scale is not None:
        angles = angles * config.rotary_scale
    angles = angles.repeat_interleave(2, dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class ModernAttention(nn.Module):
    """Causal attention over the sinks of the layer and the tokens."""

    def __init__(self, config: ModernLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.d_model, config.num_key_value_heads * config.head_dim
        if config.use_attention_sinks:
            self.sink_states = nn.Parameter(torch.zeros(config.num_attention_sinks, width))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Attend; ``mask`` (B or 1, 1, T, sinks + keys) is true where a query sees a key, None for plain causal."""
        config = self.config
        query, key, value = (
            self._heads(self.q_proj(x)),
            self._heads(self.k_proj(x)),
            self._heads(self.v_proj(x)),
        )
        if config.use_rope:
            query = _rotate(query, positions + config.sinks, config)
            key = _rotate(key, positions, config)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if config.sinks:
            key, value = self._with_sinks(key, value)
        groups = config.n_heads // config.num_key_value_heads
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=config.dropout if self.training else 0.0,
            is_causal=mask is None and query.shape[2] > 1,
        )
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return heads

    def _with_sinks(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        states = self.sink_states[None]
        sink_key, sink_value = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        if self.config.use_rope:
            places = torch.arange(self.config.sinks, device=key.device)[None]
            sink_key = _rotate(sink_key, places, self.config)
        rows = key.shape[0]
        return (
            torch.cat((sink_key.expand(rows, -1, -1, -1), key), dim=2),
            torch.cat((sink_value.expand(rows, -1, -1, -1), value), dim=2),
        )


class ModernFeedForward(nn.Module):
    """``proj(a * sigmoid(a) * b)`` with ``a, b`` the halves of ``gate(x)``."""

    def __init__(self, config: ModernLMConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, 2 * config.ffn_hidden_size)
        self.proj = nn.Linear(config.ffn_hidden_size, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        a, b = self.gate(x).chunk(2, dim=-1)
        mapped: Tensor = self.proj(functional.silu(a) * b)
        return mapped


class ModernBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind its norm, with dropout on what is added."""

    def __init__(self, config: ModernLMConfig, layer: int) -> None:
        super().__init__()
        # The order of these lines is the order of the parameters in an optimizer's state.
        self.attn = ModernAttention(config, layer)
        self.attn_norm = ModernRMSNorm(config.d_model, config.rmsnorm_eps)
        self.ffn_norm = ModernRMSNorm(config.d_model, config.rmsnorm_eps)
        self.ffn = ModernFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attn(self.attn_norm(x), positions, mask, cache))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class ModernLMPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config: ModernLMConfig
    config_class = ModernLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModernBlock"]  # noqa: RUF012 - as the base class has it
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        spread = float(self.config.initializer_range)
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=spread)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ModernRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ModernAttention) and module.config.use_attention_sinks:
            init.normal_(module.sink_states, mean=0.0, std=spread)


class ModernLMModel(ModernLMPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: ModernLMConfig) -> None:
        super().__init__(config)
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ModernBlock(config, layer) for layer in range(config.n_layers))
        self.final_norm = ModernRMSNorm(config.d_model, config.rmsnorm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.token_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.token_embed = cast("nn.Embedding", value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **_unused: object,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; ``attention_mask`` is (B, keys), ``position_ids`` (B or 1, T) restart at each document."""
        x = self.token_embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache if cache is not None else past_key_values
        if self.gradient_checkpointing and self.training:
            cache = None
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        sinks = self.config.sinks
        mask = visible_keys(position_ids, attention_mask, past=past, sinks=sinks)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, position_ids, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.final_norm(x), **{_CACHE_FIELD: cache})  # type: ignore[arg-type]


class ModernLMForCausalLM(ModernLMPreTrainedModel, GenerationMixin):
    """The decoder and its head."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embed.weight"}  # noqa: RUF012 - as the base class has it

    def __init__(self, config: ModernLMConfig) -> None:
        super().__init__(config)
        self.model = ModernLMModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **_unused: object,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V), and the mean loss where ``labels`` (not shifted, -100 ignored) are given."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache if cache is not None else past_key_values,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE_FIELD: output[_CACHE_FIELD] if cache is not None or use_cache else None},
        )


def register() -> None:
    """Make the Auto classes of transformers know the model; may be called any number of times."""
    AutoConfig.register(MODEL_TYPE, ModernLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ModernLMConfig, ModernLMForCausalLM, exist_ok=True)
