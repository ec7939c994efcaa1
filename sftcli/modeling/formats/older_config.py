"""A model's configuration in the older form too, for transformers before 5 and the programs that follow it.

transformers 5 keeps all that is said of rotary positions in ``rope_parameters``. Before it stood in keys of their own, and
a reader that looks for those (transformers 4, optimum, mlx-lm, Ollama) takes its default where there is none: it opens the
model and computes another. Both forms are written, and say the same.
"""

from collections.abc import Mapping
from typing import Any

_ROPE = "rope_parameters"
_PLAIN = {"rope_type": "default"}  # positions that are not scaled have no rope_scaling
# model_type -> older names of the base of the positions, and of the share of a head that turns.
_FLAT_NAMES: Mapping[str, tuple[str, str]] = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# model_type -> older names of the base in layers that see everything, and in those with a window. Models of other kinds
# whose layers differ came with transformers 5, and have no older form.
_NAMES_BY_LAYER: Mapping[str, tuple[str, str]] = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_decoder": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
# model_type -> older names of kinds of layers; transformers 5 reads them too, and others end with an error in release 4.
_LAYER_NAMES: Mapping[str, Mapping[str, str]] = {
    "granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"},
    "zamba": {"linear_attention": "mamba"},
    "zamba2": {"linear_attention": "mamba"},
}
_LAYER_KEYS = ("layer_types", "layers_block_type")
# model_type -> older name of a key, and the name that it has now; transformers 5 reads both.
_RENAMED: Mapping[str, tuple[str, str]] = {"qwen3_moe": ("num_experts", "num_local_experts")}
# Older code takes exactly these keys of the scaling, the kind under the name "type".
_PHI = frozenset({"phi3", "phi4_multimodal"})
_GENERIC = "PreTrainedTokenizerFast"  # any tokenizer.json; what transformers 5 calls TokenizersBackend
# What a folder says of its own weights and of this machine; it is told anew, or left out.
_NOT_KEPT = frozenset({"torch_dtype", "dtype", "quantization_config", "auto_map", "transformers_version"})


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a ``config.json`` with the older keys added, at every depth; it means what it meant."""
    result = {
        key: with_older_keys(value) if isinstance(value, dict) else _plain(value)
        for key, value in config.items()
    }
    rope, kind = config.get(_ROPE), str(config.get("model_type"))
    for key in _LAYER_KEYS:
        if kind in _LAYER_NAMES and isinstance(layers := config.get(key), list):
            result[key] = [_LAYER_NAMES[kind].get(layer, layer) for layer in layers]
    if kind in _RENAMED and (name := _RENAMED[kind])[1] in config:
        result.setdefault(name[0], config[name[1]])
    if isinstance(rope, dict):
        found = _by_layer(rope, kind) if _is_by_layer(rope) else _flat(rope, kind)
        result = found | result
    return result


def with_keys_of(source: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the keys that only ``source``, the ``config.json`` it was read from, has: some reader's.

    Nothing is taken of a configuration of another kind, as of a model that is a part of the one in ``source``.
    """
    result = dict(config)
    if source.get("model_type") != config.get("model_type"):
        return result
    for key, value in source.items():
        known = config.get(key)
        if key not in config and key not in _NOT_KEPT and not key.startswith("_"):
            result[key] = value
        elif isinstance(value, dict) and isinstance(known, dict) and "model_type" in known:
            result[key] = with_keys_of(value, known)
    return result


def _is_by_layer(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in rope.values())


def _flat(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    theta, share = _FLAT_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
    result = {}
    if "rope_theta" in rope:
        result[theta] = rope["rope_theta"]
    if rope.get("partial_rotary_factor") is not None:
        result[share] = rope["partial_rotary_factor"]
    if scaling := _scaling(rope):
        if kind in _PHI:
            scaling = {"type": scaling["rope_type"]} | {
                key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling
            }
        result["rope_scaling"] = scaling
    return result


def _by_layer(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    whole, window = rope.get("full_attention"), rope.get("sliding_attention")
    if kind not in _NAMES_BY_LAYER or not isinstance(whole, dict) or not isinstance(window, dict):
        return {}
    names = _NAMES_BY_LAYER[kind]
    result = {names[1]: window.get("rope_theta"), names[0]: whole.get("rope_theta")}
    if scaling := _scaling(whole):
        result["rope_scaling"] = scaling
    return result


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are scaled, or nothing where they are not."""
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {} if rest == _PLAIN else rest


def _plain(value: object) -> object:
    """Return a number that transformers 5 writes as an object (infinity) as the number that older readers know."""
    if isinstance(value, list):
        return [
            float(item["__float__"]) if isinstance(item, dict) and item.keys() == {"__float__"} else item
            for item in value
        ]
    return value


def with_older_tokenizer_keys(content: Mapping[str, Any], *, takes_types: bool) -> dict[str, Any]:
    """Return the content of a ``tokenizer_config.json`` so that transformers 4 opens it and passes what the model takes.

    Args:
        content: As it stands.
        takes_types: Whether the model has a place for ``token_type_ids``, which that release makes of every text unless
            it is told which inputs there are.
    """
    result = dict(content)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = _GENERIC
    if isinstance(extra := result.get("extra_special_tokens"), list):
        # A list of tokens there is a newer form; that key held names of tokens before.
        del result["extra_special_tokens"]
        known = result.get("additional_special_tokens") or []
        result["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    if result.get("tokenizer_class") == _GENERIC and not takes_types:
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return result
