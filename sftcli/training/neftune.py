"""Noise on embeddings while training: Jain et al. 2023, NEFTune: Noisy Embeddings Improve Instruction Finetuning."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_embedding_noise(model: "PreTrainedModel", alpha: float) -> None:
    """Add uniform noise of up to ``alpha / sqrt(T * D)`` to embeddings (B, T, D) while the model is in training mode.

    It comes from torch's generator, whose state a checkpoint holds. Scoring and generating see none.
    """

    def noisy(module: torch.nn.Module, _: object, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        bound = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(noisy)
