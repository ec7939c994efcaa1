"""One decoding step of a Llama or Qwen2 in few large operations.

A step of one token a row is bound by reading the weights, and by the time between operations. Here the projections of a layer
that read the same input are one matrix, rotary tables are made once, and heads that share keys are rows of one product, so
that no key is copied. It computes what the model's own ``forward`` does, and works on the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn import Linear
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM)
_TABLE = 512  # positions that the rotary tables grow by


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLayer:
    """Weights of a layer."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class FusedStep:
    """The model as ``step`` needs it."""

    def __init__(self, model: "PreTrainedModel") -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        body = cast("LlamaForCausalLM", model).model
        self.embedding, self.norm = body.embed_tokens, body.norm.weight
        self.head = cast("Linear", model.get_output_embeddings())  # type: ignore[no-untyped-call]
        self.rotary = body.rotary_emb
        self.layers = [_fused(layer) for layer in body.layers]
        self.cos = self.sin = torch.empty(0)  # (positions, 1, head size)

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        width: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take one token a row, write its keys and values, and return the logits of the next.

        Args:
            tokens: (B,) int64.
            positions: Of the tokens, (B,) int64.
            caches: Keys and values of every layer, (slots, kv heads, room, head size), written in place.
            slots: Of the rows, (B,): 0 to B - 1.
            width: Positions that count, those of ``tokens`` included.
            mask: (B, 1, 1, width), true where a row may look; None where all rows look at all.

        Returns:
            (B, V).
        """
        count, half = len(tokens), self.head_size // 2
        self._make_tables(width, tokens.device)
        cos, sin = self.cos[positions], self.sin[positions]
        hidden = F.embedding(tokens, self.embedding.weight)
        # Where all rows are equally long the new position is a slice, which is cheaper to write than an index.
        place = slice(width - 1, width) if mask is None else None
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, self.eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(count, -1, self.head_size)
            turned, value = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
            swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
            turned = turned * cos + swapped * sin
            query, key = turned[:, : self.heads], turned[:, self.heads :]
            if place is not None:
                keys[:count, :, place] = key[:, :, None]
                values[:count, :, place] = value[:, :, None]
            else:
                keys[slots, :, positions] = key
                values[slots, :, positions] = value
            seen = F.scaled_dot_product_attention(
                query.view(count, self.kv_heads, -1, self.head_size),
                keys[:count, :, :width],
                values[:count, :, :width],
                attn_mask=mask,
            )
            hidden = hidden + F.linear(seen.reshape(count, -1), layer.out)
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps)
        return F.linear(hidden, self.head.weight)

    def _make_tables(self, positions: int, device: torch.device) -> None:
        if len(self.cos) >= positions:
            return
        every = torch.arange(positions + _TABLE, device=device)[None]
        like = self.embedding.weight[:1, None]
        cos, sin = self.rotary(like, position_ids=every)
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]


_known: "WeakKeyDictionary[PreTrainedModel, FusedStep]" = WeakKeyDictionary()


def fuse(model: "PreTrainedModel") -> None:
    """Let ``fused_step`` know ``model`` where it is one that this module computes. Its weights stay what they are.

    They become views of larger tensors, so that nothing is held twice. Not for models that are trained.
    """
    if isinstance(model, _FAMILIES) and type(model) in _FAMILIES and _is_plain(model):
        with torch.no_grad():
            _known[model] = FusedStep(model)


def fused_step(model: "PreTrainedModel") -> FusedStep | None:
    """Return the faster step of a model that ``fuse`` was told of, or None."""
    return _known.get(model)


def _is_plain(model: "PreTrainedModel") -> bool:
    """Tell whether every projection is an ordinary matrix, without adapters or quantization, and of one kind."""
    config = model.config
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    return (
        config.hidden_act == "silu"
        and rope in {"default", "linear", "llama3"}  # not those that change with the length of the text
        and len(linear) == 7 * config.num_hidden_layers + 1
        and all(type(module) is Linear for module in linear)
        and not getattr(config, "mlp_bias", False)
        and all(layer.self_attn.o_proj.bias is None for layer in cast("LlamaForCausalLM", model).model.layers)
        and len({(weight.dtype, weight.device) for weight in model.parameters()}) == 1
    )


def _fused(layer: torch.nn.Module) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, torch.nn.Module)
    assert isinstance(mlp, torch.nn.Module)
    qkv = [cast("Linear", getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    has_bias = qkv[0].bias is not None
    return FusedLayer(
        attention_norm=_weight(layer.input_layernorm),
        qkv=_joined(qkv),
        qkv_bias=torch.cat([module.bias for module in qkv]) if has_bias else None,
        out=_weight(attention.o_proj),
        mlp_norm=_weight(layer.post_attention_layernorm),
        gate_up=_joined([cast("Linear", mlp.gate_proj), cast("Linear", mlp.up_proj)]),
        down=_weight(mlp.down_proj),
    )


def _weight(module: "torch.Tensor | torch.nn.Module") -> torch.Tensor:
    return cast("Linear", module).weight


def _joined(modules: Sequence[Linear]) -> torch.Tensor:
    """Return the weights of ``modules`` one below the other; each becomes a part of it."""
    whole = torch.cat([module.weight for module in modules])
    begin = 0
    for module in modules:
        end = begin + len(module.weight)
        module.weight.data = whole[begin:end]
        begin = end
    return whole
