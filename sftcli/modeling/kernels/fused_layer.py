"""A Llama's layer on a row of documents as two operations on a CPU: attention, and feed-forward, each with its norm and sum.

Between the products of a layer there are forty operations on rows, each with a result of its own. In one operation most of them
overwrite what is not needed any more, and what the norms make is made again in the backward pass instead of kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from sftcli.memory_faults import Attempt
from sftcli.modeling.attention import attention_of, is_named
from sftcli.modeling.kernels.cpu_attention import attend, attend_backward
from sftcli.modeling.kernels.document_attention import (
    attend_as_before,
    attend_by_document,
    overheard,
)
from sftcli.modeling.kernels.fused_math import (
    AnyGate,
    Gate,
    KeptGate,
    class_forward,
    feed_forward_backward,
    gate_and_up,
    has_hooks,
    norm_backward,
    norm_epsilon,
    norm_scale,
    normed,
)
from sftcli.runtime import Context, applied, body_of

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
_TRIED_LENGTHS = [2, 3]  # of the documents that a layer is tried on
_CAUSAL = ("sdpa", "sft_documents")  # attention that without a mask looks back only
_Kwargs = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Arguments of attention besides tensors: the lengths of the documents, and the scale of the scores."""

    lengths: Sequence[int]
    head_dim: int
    scale: float
    epsilon: float


class _KeptShape(Context, Protocol):
    shape: AttentionShape


class AttentionBlock(torch.autograd.Function):
    """``x + o(attention(turned(q(n)), turned(k(n)), v(n)))`` with ``n = norm(x)``."""

    @staticmethod
    def forward(
        ctx: "_KeptShape",
        x: torch.Tensor,
        gain: torch.Tensor,
        out: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        shape: AttentionShape,
        *projections: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return (T, D) for ``x`` (T, D).

        ``projections`` are the weights (heads * head size, D) of queries, keys and values, then their biases; ``out`` is
        (D, heads * head size). ``cos`` and ``sin`` are (T, head size), and both of their halves are alike.
        """
        scale = norm_scale(x, shape.epsilon)
        rows = normed(x, gain, scale)
        query, key, value = (
            functional.linear(rows, weight, bias).view(len(x), -1, shape.head_dim)  # type: ignore[arg-type]
            for weight, bias in zip(projections[:3], projections[3:], strict=True)
        )
        del rows  # made again in the backward pass, from ``x`` and ``scale``
        # In place: what is kept for the backward pass is turned already, as attention saw it.
        turns = cos[:, None], _signed(sin)[:, None]
        parts = _by_head(_turn(query, *turns)), _by_head(_turn(key, *turns)), _by_head(value)
        seen, sums = attend(*parts, shape.lengths, shape.scale)
        kept = (x, gain, out, cos, sin, scale, query, key, value, seen, *projections, *sums)
        ctx.save_for_backward(*kept)
        ctx.shape = shape
        return torch.addmm(x, seen.view(len(x), -1), out.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: "_KeptShape", gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the weights and biases."""
        x, gain, out, cos, sin, scale, query, key, value, seen, *rest = ctx.saved_tensors
        shape, needs = ctx.shape, ctx.needs_input_grad  # one for each argument of ``forward``
        weights, sums = rest[:3], rest[6:]
        grad_out = gradient.t() @ seen.view(len(x), -1) if needs[2] else None
        grad_seen = (gradient @ out).view_as(seen)
        parts = (_by_head(query), _by_head(key), _by_head(value))
        grad_parts = attend_backward(grad_seen, parts, seen, sums, shape.lengths, shape.scale)
        back = cos[:, None], -_signed(sin)[:, None]  # the other way round
        grads = [part[0].transpose(0, 1) for part in grad_parts]
        flat = [part.view(len(x), -1) for part in (_turn(grads[0], *back), _turn(grads[1], *back), grads[2])]
        rows = normed(x, gain, scale)
        grad_weights = [
            part.t() @ rows if need else None for part, need in zip(flat, needs[6:9], strict=True)
        ]
        grad_biases = [part.sum(0) if need else None for part, need in zip(flat, needs[9:], strict=True)]
        grad_rows = flat[0] @ weights[0]
        for part, weight in zip(flat[1:], weights[1:], strict=True):
            grad_rows.addmm_(part, weight)
        grad_x, grad_gain = norm_backward(grad_rows, x, gain, scale)
        return (
            grad_x.add_(gradient) if needs[0] else None,  # of the sum around the block
            grad_gain if needs[1] else None,
            grad_out,
            None,
            None,
            None,
            *grad_weights,
            *grad_biases,
        )


class FeedForwardBlock(torch.autograd.Function):
    """``x + down(act(gate(n)) * up(n))`` with ``n = norm(x)``."""

    @staticmethod
    def forward(
        ctx: KeptGate,
        x: torch.Tensor,
        gain: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        gating: Gate,
        epsilon: float,
    ) -> torch.Tensor:
        """Return (1, T, D) for ``x`` (T, D); ``gate`` and ``up`` are (F, D), ``down`` is (D, F).

        A layer returns a batch. It is made as one here, since FSDP2 refuses a view as the output of what it shards.
        """
        scale = norm_scale(x, epsilon)
        gated, upped = gate_and_up(normed(x, gain, scale), gate, up)
        ctx.save_for_backward(x, gain, gate, up, down, scale, gated, upped)
        ctx.gate = gating
        batch = x.new_empty(1, *x.shape)
        torch.addmm(x, gating.product(gated, upped), down.t(), out=batch[0])
        return batch

    @staticmethod
    @once_differentiable
    def backward(ctx: KeptGate, batch_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the weights."""
        gradient = batch_gradient[0]
        x, gain, gate, up, down, scale, gated, upped = ctx.saved_tensors
        needs_x, needs_gain, *needs = ctx.needs_input_grad[:5]
        grad_rows, *grad_weights = feed_forward_backward(
            gradient,
            normed(x, gain, scale),
            (gate, up, down),
            gated,
            upped,
            ctx.gate,
            needs=(True, *needs),
        )
        assert grad_rows is not None
        grad_x, grad_gain = norm_backward(grad_rows, x, gain, scale)
        return (
            grad_x.add_(gradient) if needs_x else None,  # of the sum around the block
            grad_gain if needs_gain else None,
            *grad_weights,
            None,
            None,
        )


def _signed(sin: torch.Tensor) -> torch.Tensor:
    """Return ``sin`` (T, head size) with the signs that it has where halves are swapped."""
    return torch.cat((-sin[:, : sin.shape[1] // 2], sin[:, sin.shape[1] // 2 :]), dim=1)


def _turn(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn ``part`` (T, heads, head size) by its positions, in place (RoPE, Su et al. 2021, arXiv:2104.09864)."""
    swapped = part.roll(part.shape[-1] // 2, -1)
    return part.mul_(cos).addcmul_(swapped, sin)


def _by_head(part: torch.Tensor) -> torch.Tensor:
    """Return ``part`` (T, heads, head size) as attention takes it, (1, heads, T, head size)."""
    return part.transpose(0, 1)[None]


def is_layer(module: torch.nn.Module) -> bool:
    """Return whether ``module`` has the parts of a Llama's layer and no others."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    return (
        _names(module) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        and _names(attention) == set(_PROJECTIONS)
        and getattr(getattr(attention, "config", None), "_attn_implementation", None) in _CAUSAL
        and _names(mlp) in ({*GATED}, {*GATED, "act_fn"})
        and all(isinstance(getattr(attention, name, None), int | float) for name in ("head_dim", "scaling"))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What a model passes to one of its layers besides hidden states, and the resulting attention arguments."""

    row: _Kwargs  # for documents in one row
    documents: Sequence[_Kwargs]  # for each of them by itself, with the attention of transformers
    window: int | None  # how many keys a query sees


@torch.no_grad()
def observe_layers(model: torch.nn.Module) -> dict[torch.nn.Module, Passed]:
    """Let ``model`` run on documents in one row, and on each by itself, and return what reaches its layers.

    A layer that runs not once in a pass, whose attention is told of a mask or of dropout, or that is not reached through
    keywords, is left out, and so are all layers of a model that cannot be told of documents.
    """
    layers = [module for module in model.modules() if is_layer(module)]
    if not layers or not isinstance(model, PreTrainedModel):
        return {}
    if is_named(model) or attention_of(model) != _CAUSAL[0]:
        return {}
    device, bounds = model.device, [0, *accumulate(_TRIED_LENGTHS)]
    ids = torch.arange(bounds[-1], device=device)[None]
    cuts = torch.tensor(bounds, dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in _TRIED_LENGTHS])[None]
    longest = max(_TRIED_LENGTHS)
    arguments: dict[str, object] = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "position_ids": positions}
    arguments |= {"max_length_q": longest, "max_length_k": longest}
    try:
        with Attempt() as attempt:
            attend_by_document(model)
            with overheard() as found:
                row = _kwargs_of(model, layers, input_ids=ids, **arguments)
            attend_as_before(model)
            documents = [
                _kwargs_of(model, layers, input_ids=part) for part in torch.split(ids, _TRIED_LENGTHS, dim=1)
            ]
    finally:
        attend_as_before(model)
    if attempt.failed or not found.is_complete:
        return {}
    passed = {}
    for layer in layers:
        calls = [call for call in found.calls if call.module is layer.self_attn]
        is_known = layer in row and all(layer in document for document in documents)
        if is_known and len(calls) == 1 and not (calls[0].has_mask or calls[0].dropout):
            mine = [document[layer] for document in documents]
            passed[layer] = Passed(row=row[layer], documents=mine, window=calls[0].window)
    return passed


def _kwargs_of(
    model: PreTrainedModel, layers: Sequence[torch.nn.Module], **inputs: object
) -> dict[torch.nn.Module, _Kwargs]:
    """Return what each of ``layers`` that runs once gets by keyword, and nothing else, beside hidden states."""
    calls: dict[torch.nn.Module, list[tuple[int, _Kwargs]]] = {layer: [] for layer in layers}

    def keep(layer: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls[layer].append((len(args), kwargs))

    with _hooked(layers, keep):
        body_of(model)(**inputs, use_cache=False)
    return {layer: found[0][1] for layer, found in calls.items() if [count for count, _ in found] == [1]}


@contextmanager
def _hooked(layers: Sequence[torch.nn.Module], hook: Any) -> Iterator[None]:  # noqa: ANN401 - torch's own type is long
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, *, window: int | None = None, **rest: object
) -> torch.Tensor:
    """Run a layer as two operations for one row of documents on a CPU, otherwise as its class does.

    Documents that are longer than ``window``, which is how far back its attention sees, are left to the class, and so is a part of
    the positions, whose attention other processes have a share in.
    """
    bounds = cast("torch.Tensor | None", rest.get("cu_seq_lens_q"))
    turns = cast("Sequence[torch.Tensor] | None", rest.get("position_embeddings"))
    if bounds is None or turns is None or not _is_plain_pass(self, hidden_states, turns, rest):
        return class_forward(self, hidden_states, **rest)
    lengths: list[int] = bounds.diff().tolist()
    if (window is not None and max(lengths) > window) or sum(lengths) != hidden_states.shape[1]:
        return class_forward(self, hidden_states, **rest)
    layer = cast("LlamaDecoderLayer", self)
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    shape = AttentionShape(
        lengths=lengths,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        epsilon=norm_epsilon(before) or 0.0,
    )
    projections = [getattr(attention, name) for name in _PROJECTIONS[:3]]
    made = applied(
        AttentionBlock,
        hidden_states[0],
        before.weight,
        attention.o_proj.weight,
        *(table[0] for table in turns),
        shape,
        *(part.weight for part in projections),
        *(part.bias for part in projections),
    )
    weights = (getattr(mlp, name).weight for name in GATED)
    gate = AnyGate(mlp.act_fn)
    return applied(FeedForwardBlock, made, after.weight, *weights, gate, norm_epsilon(after) or 0.0)


def _is_plain_pass(
    layer: torch.nn.Module, x: torch.Tensor, turns: Sequence[torch.Tensor], rest: Mapping[str, object]
) -> bool:
    attention = cast("LlamaDecoderLayer", layer).self_attn
    linear = [
        getattr(part, name)
        for part, names in ((attention, _PROJECTIONS), (layer.mlp, GATED))
        for name in names
    ]
    dropout = layer.training and bool(getattr(attention, "attention_dropout", 0.0))
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and len(x) == 1
        and all(rest.get(name) is None for name in ("attention_mask", "cache", "past_key_values"))
        and not dropout
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))  # their class sees to it
        and all(part.shape[-1] == attention.head_dim for part in turns)
        and all(type(part) is torch.nn.Linear and part.weight.dtype == x.dtype for part in linear)
        and all(getattr(part, "bias", None) is None for part in linear[3:])
        and not any(has_hooks(part) for part in layer.modules() if part is not layer)
    )


def try_on_documents(
    layer: torch.nn.Module, forward: Callable[..., torch.Tensor], x: torch.Tensor, passed: Passed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the layer's class makes of documents by themselves, and what ``forward`` makes of them in a row.

    Args:
        layer: One of those that ``is_layer`` knows.
        forward: Its faster form.
        x: Its hidden states, (1, sum of the documents' lengths, D).
        passed: What the model gives it besides.
    """
    plain = [
        type(layer).forward(layer, part, **kwargs)
        for part, kwargs in zip(torch.split(x, _TRIED_LENGTHS, dim=1), passed.documents, strict=True)
    ]
    return torch.cat(plain, dim=1), forward(layer, x, **passed.row)


def _names(module: object) -> set[str]:
    return {name for name, _ in module.named_children()} if isinstance(module, torch.nn.Module) else set()
