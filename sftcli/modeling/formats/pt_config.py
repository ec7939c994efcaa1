"""The configuration in a checkpoint of the Modern LLM pipeline: its keys, and which values are read."""

from collections.abc import Mapping
from pathlib import Path

from sftcli.errors import DataError, MismatchError
from sftcli.modeling.modern_lm.config import LIMITS, Limit, ModernLMConfig, misfit
from sftcli.suggest import did_you_mean

AGAIN = "copy or download the file again, or write it again with the original program"

_REQUIRED = ("vocab_size", "d_model", "n_layers", "n_heads", "ffn_hidden_size", "max_seq_len")
_DEFAULTS: Mapping[str, object] = {
    "rmsnorm_eps": 1e-5, "dropout": 0.0, "initializer_range": 0.02, "rope_theta": 10000.0, "rope_scaling": None,
    "use_rope": True, "use_attention_sinks": True, "num_attention_sinks": 2, "use_swiglu": True,
    "swiglu_multiplier": 2.0, "use_gqa": False, "gqa_groups": None, "use_moe": False, "moe_config": None,
    "tie_embeddings": True,
}  # fmt: skip
CONFIG_KEYS = (*_REQUIRED, *_DEFAULTS)
_RENAMED = {
    "rope_theta": "rotary_base",
    "rope_scaling": "rotary_scale",
    "tie_embeddings": "tie_word_embeddings",
}
_EXPERTS: Mapping[str, Limit] = {  # whose values a model of transformers has not
    "use_moe": (lambda value: isinstance(value, bool), "true or false"),
    "moe_config": (lambda value: isinstance(value, Mapping | None), "a dictionary, or nothing"),
}


def checked_config(path: Path, found: object) -> dict[str, object]:
    """Return the configuration ``found`` in the file ``path`` with all of its keys.

    Raises:
        DataError: It is none.
        MismatchError: A key is unknown, or its value is none that a model can be made with.
    """
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: config is not a dictionary", hint=AGAIN)
    for key in found:
        if key not in CONFIG_KEYS:
            raise MismatchError(
                f"{path}: config has the unknown key {key!r}", hint=did_you_mean(str(key), CONFIG_KEYS)
            )
    config = {**dict.fromkeys(_REQUIRED), **_DEFAULTS, **found}
    for key, value in config.items():
        if fault := misfit(value, _limit(key)):
            raise MismatchError(f"{path}: config.{key} {fault}", hint=AGAIN)
    if config["use_moe"]:
        raise MismatchError(
            f"{path}: config.use_moe is True, but this format does not support mixtures of experts",
            hint="start from a dense checkpoint",
        )
    _check_heads(path, config)
    return config


def _limit(key: str) -> Limit:
    return _EXPERTS[key] if key in _EXPERTS else LIMITS[_RENAMED.get(key, key)]


def _check_heads(path: Path, config: Mapping[str, object]) -> None:
    width, heads, groups = (config[key] for key in ("d_model", "n_heads", "gqa_groups"))
    assert isinstance(width, int)
    assert isinstance(heads, int)
    if width % heads or (width // heads) % 2:
        raise MismatchError(
            f"{path}: config.d_model {width} does not divide into {heads} heads of even width"
        )
    if config["use_gqa"] and (not isinstance(groups, int) or heads % groups):
        raise MismatchError(f"{path}: config.gqa_groups is {groups!r}, which does not divide n_heads {heads}")


def hf_config(config: Mapping[str, object]) -> ModernLMConfig:
    """Return the transformers configuration of a file's."""
    values = {_RENAMED.get(key, key): value for key, value in config.items()}
    for dropped in ("use_moe", "moe_config"):
        values.pop(dropped, None)
    return ModernLMConfig(**values)  # type: ignore[arg-type]


def file_config(config: ModernLMConfig) -> dict[str, object]:
    """Return the configuration that a file holds, with all of its keys."""
    dropped = {"use_moe": False, "moe_config": None}
    return {
        key: dropped[key] if key in dropped else getattr(config, _RENAMED.get(key, key))
        for key in CONFIG_KEYS
    }
