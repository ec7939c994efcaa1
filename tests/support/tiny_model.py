"""A seeded random Llama of about 30,000 weights with the tiny tokenizer, as an ordinary Hugging Face folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tests.support.tiny_tokenizer import build_tiny_tokenizer


def tiny_config(*, tie: bool = True, dropout: float = 0.0) -> LlamaConfig:
    """Two layers, hidden 32, 4 heads, 2 key-value heads; ids as the tiny tokenizer numbers them."""
    return LlamaConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def build_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    tie: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the model and its tokenizer with a ChatML template to ``folder``; equal seeds give equal weights.

    The state of torch's global generator is left as it was.
    """
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tie=tie, dropout=dropout))
    model.to(dtype).save_pretrained(folder)
    return build_tiny_tokenizer(folder)


def same_weights(found: Path, original: Path, *, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Return whether the folder ``found`` holds the tensors of ``original``, rounded to ``dtype``."""
    ours, theirs = load_file(found / "model.safetensors"), load_file(original / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k].to(dtype)) for k in ours)
