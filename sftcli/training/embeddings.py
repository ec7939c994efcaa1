"""Embeddings that do not train, and noise on those that do."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_embeddings(model: "PreTrainedModel") -> None:
    """Leave token embeddings and output head as they are.

    AdamW scales every gradient to about the same step, also the tiny ones that the softmax sends to each token that a
    batch does not use: over a short run on few rows they add up and push rare tokens down.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.requires_grad_(False)


def embedding_names(model: "PreTrainedModel") -> frozenset[str]:
    """Return the names of the weights of token embeddings and output head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
    return frozenset(name for name, weight in model.named_parameters() if id(weight) in own)


def add_embedding_noise(model: "PreTrainedModel", alpha: float, *, parts: int = 1) -> None:
    """Add uniform noise of up to ``alpha / sqrt(T * D)`` to embeddings (B, T, D) while the model is in training mode.

    T are all positions of a row, of which this process may have one of ``parts``.
    It comes from torch's generator, whose state a checkpoint holds. Scoring and generating see none.
    """

    def noisy(module: torch.nn.Module, _: object, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        bound = alpha / math.sqrt(parts * embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(noisy)
