"""Utilization: the operations a step needs, relative to the measured matrix-multiply rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from sftcli.data.batches.batch import Batch
from sftcli.modeling.architecture import beside_text
from sftcli.modeling.config_values import config_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Floating-point operations that a step needs, by what it is made of; an addition and a multiplication are two.

    A matrix of N weights takes 2 N for a token forward, 2 N for the gradient of its input, and 2 N for its own gradient
    where it trains: the 6 N of Kaplan et al. (2020, arXiv:2001.08361, table 1), 4 N for a frozen matrix below an adapter.
    Attention takes 4 H D for a pair of positions forward, with H heads of D numbers (2 H D for its score, 2 H D for its
    value), and twice that backward: the 12 L H Q T of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with the
    pairs that are there, which are those of a causal mask within a document, in place of all T.

    Only what any program would have to do is counted. So the head counts at positions with loss alone, padding and what
    gradient checkpointing does again count nothing, and neither do norms, rotary positions and look-ups. Layers of
    sliding-window or linear attention count with their matrices alone. What comes out is too low rather than too high.
    """

    per_token: float
    per_response_token: float
    per_pair: float

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Workload":
        """Count the matrices of ``model``, and which of them train."""
        head = model.get_output_embeddings()
        of_head = {} if head is None else {id(weight): weight for weight in head.parameters()}
        looked_up = {
            id(weight)
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding)
            for weight in module.parameters()
        }
        share, beside = _expert_share(model), beside_text(model)
        body = sum(
            _products(weight) * (share if ".experts." in name else 1.0)
            for name, weight in model.named_parameters()
            if id(weight) not in of_head and id(weight) not in looked_up and name not in beside
        )
        return cls(
            per_token=body,
            per_response_token=sum(map(_products, of_head.values())),
            per_pair=12.0 * _attention_width(model),
        )

    def flops(self, window: Sequence[Batch]) -> float:
        """Return what a step on ``window`` needs."""
        return sum(
            self.per_token * batch.tokens
            + self.per_response_token * batch.response_tokens
            + self.per_pair * batch.attended_pairs
            for batch in window
        )


@dataclass(slots=True, kw_only=True)
class Gauge:
    """Computes the share of the measured ``peak_flops`` per second that a step uses.

    A machine that was busy is measured too slow: a step that beats the peak is the peak from then on.
    """

    workload: Workload
    peak_flops: float

    @classmethod
    def of(cls, model: "PreTrainedModel", *, peak_flops: float) -> "Gauge | None":
        """Return the gauge of ``model``; None if its work is unknown, as a display value must not end a run."""
        try:
            return cls(workload=Workload.of(model), peak_flops=peak_flops)
        except Exception:  # noqa: BLE001 - models differ in ways that nobody has seen yet
            return None

    def __call__(self, window: Sequence[Batch], seconds: float) -> float:
        """Return what part of the peak a step of ``seconds`` on ``window`` ran at."""
        rate = self.workload.flops(window) / max(seconds, 1e-9)
        self.peak_flops = max(self.peak_flops, rate)
        return rate / self.peak_flops


def _products(weight: torch.Tensor) -> float:
    """Return the operations for a token of a matrix, forward and backward; a vector takes part in no product."""
    packed = getattr(weight, "quant_state", None)  # of bitsandbytes, which packs 4-bit weights in bytes
    shape = weight.shape if packed is None else packed.shape
    return float((6 if weight.requires_grad else 4) * prod(shape)) if len(shape) > 1 else 0.0


def _expert_share(model: "PreTrainedModel") -> float:
    """Return what part of its experts a token goes through; 1 for a model without experts."""
    counts = (config_value(model, name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    total = next((count for count in counts if count), None)
    used = config_value(model, "num_experts_per_tok")
    return used / total if used and total else 1.0


def _attention_width(model: "PreTrainedModel") -> int:
    """Return heads times numbers of a head, summed over the layers whose attention sees all that came before."""
    heads = config_value(model, "num_attention_heads") or 0
    if not heads:
        return 0
    layers = config_value(model, "num_hidden_layers")
    kinds = config_value(model, "layer_types") or ["full_attention"] * layers
    size = config_value(model, "head_dim") or config_value(model, "hidden_size") // heads
    return int(kinds.count("full_attention") * heads * size)
