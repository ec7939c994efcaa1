"""What a configuration says about a model's size, held against the tensors beside it before anything is built of that size.

A model is built as large as its configuration says, and takes that time and memory, before its weights are seen not to fit.
The bounds are wide: what is merely wrong is told with the names of the tensors, by whoever loads them.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
_SIDES = ("vocab_size", "hidden_size", "n_embd", "d_model", "embedding_length")
_PARTS = (  # which a tensor may hold packed, or no tensor at all, where the model has the part not
    *("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "feed_forward_length"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim", "attention.head_count"),
    *("num_experts", "num_local_experts", "n_routed_experts", "expert_count"),
)  # fmt: skip
_SLACK = 64  # times the longest side, for a part
_PACKED = 16  # numbers in one, at most, in quantized weights
_NUMBERED = re.compile(r"\.(\d{1,9})\.")


def impossible_claim(config: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> str:
    """Return what of ``config`` no model with tensors of these ``shapes`` can have, as "SAYS, the weights ..."; else "".

    Args:
        config: Keys and values; a nested configuration of text counts as well.
        shapes: By the tensor's name.
    """
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    packed = _PACKED if "quantization_config" in config else 1
    for key, value in _numbers(config):
        if key in _LAYERS and value > len(shapes):
            return f"{_shown(value)} layers, the weights hold {_layers(shapes)}"
        most = longest * packed * (1 if key in _SIDES else _SLACK)
        if key in (*_SIDES, *_PARTS) and value > most:
            return f"{key} {_shown(value)}, no side of a tensor in the weights is longer than {longest}"
    return ""


def _shown(value: int) -> str:
    text = str(value)
    return text if len(text) <= 15 else f"{text[:6]}... ({len(text)} digits)"


def _numbers(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key, value in values.items():
            if isinstance(value, int):
                yield key, value


def _layers(names: Collection[str]) -> int:
    """Return how many layers tensors of these names belong to: those of the longest list of modules."""
    found = (int(match[1]) for name in names if (match := _NUMBERED.search(name)))
    return max(found, default=-1) + 1
