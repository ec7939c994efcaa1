"""The JSON configuration of the Modern LLM pipeline, of which the SFT stage's part is read."""

from collections.abc import Mapping
from dataclasses import dataclass

from sftcli.config.toml_file import TomlDocument, tables_of
from sftcli.errors import Location, UsageError

_KEYS = {
    "sft_max_steps": "training.max_steps",
    "sft_lr": "training.learning_rate",
    "sft_batch_size": "training.batch_size",
    "sft_micro_batch_size": "training.micro_batch_size",
    "sft_dataset": "data.sources",
    "sft_datasets": "data.sources",
    "run_name": "run.name",
    "tokenizer_name": "model.tokenizer",
    "max_seq_len": "data.max_tokens",
    "save_every": "checkpoint.every_steps",
    "eval_every": "training.eval_every_steps",
    "log_every": "training.log_every_steps",
    "seed": "training.seed",
    "mixed_precision": "training.precision",
    "output_dir": "run.root",
}
# The checkpoint says these itself; where the two differ, the user is told.
_MODEL_KEYS = frozenset(
    {
        "vocab_size", "d_model", "n_layers", "n_heads", "ffn_hidden_size", "rmsnorm_eps", "dropout",
        "initializer_range", "rope_theta", "rope_scaling", "use_rope", "use_attention_sinks", "num_attention_sinks",
        "use_swiglu", "swiglu_multiplier", "use_gqa", "gqa_groups", "use_moe", "moe_config", "tie_embeddings",
    }
)  # fmt: skip
_PRECISION: Mapping[object, str] = {
    "bf16": "bf16",
    "fp16": "fp16",
    "no": "fp32",
    "fp32": "fp32",
    True: "auto",
    False: "fp32",
    None: "auto",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """The settings of a pipeline's configuration, what it says about the model, and keys that mean nothing here."""

    document: TomlDocument
    model_keys: Mapping[str, object]
    ignored: tuple[str, ...]


def is_pipeline(content: Mapping[str, object]) -> bool:
    """Return whether ``content`` has a key of the pipeline's own."""
    return any(key.startswith("sft_") and key in _KEYS for key in content) or not _MODEL_KEYS.isdisjoint(
        content
    )


def read_pipeline(content: Mapping[str, object], name: str) -> PipelineConfig:
    """Read what a pipeline's configuration called ``name`` holds.

    Raises:
        UsageError: It names both ``sft_dataset`` and ``sft_datasets`` differently, or a precision that is not offered.
    """
    location = Location(file=name)
    one, several = content.get("sft_dataset"), content.get("sft_datasets")
    found: dict[str, object] = {}
    for key, value in content.items():
        if key not in _KEYS or (key == "sft_dataset" and several) or (key == "sft_datasets" and not several):
            continue
        found[_KEYS[key]] = _converted(key, value, name)
    if one and isinstance(several, list) and several and one not in several:
        raise UsageError(
            f"{name}: sft_dataset is {one!r}, which is not among sft_datasets",
            hint="keep one of the two keys",
            location=location,
        )
    ignored = tuple(key for key in content if key not in _KEYS and key not in _MODEL_KEYS)
    return PipelineConfig(
        document=TomlDocument(name=name, tables=tables_of(found), places={}),
        model_keys={key: value for key, value in content.items() if key in _MODEL_KEYS},
        ignored=ignored,
    )


def _converted(key: str, value: object, name: str) -> object:
    if key == "sft_dataset":
        return [value]
    if key == "mixed_precision":
        if not isinstance(value, str | bool | None) or value not in _PRECISION:
            raise UsageError(
                f"{name}: mixed_precision is {value!r} but must be one of bf16, fp16, fp32 or no",
                location=Location(file=name),
            )
        return _PRECISION[value]
    return value
