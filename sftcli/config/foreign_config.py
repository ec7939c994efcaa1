"""Configurations of other trainers, read key by key into settings of ours: TRL, axolotl, LLaMA-Factory, Unsloth and the Trainer.

A key is one of four: it has a row in ``ROWS``, something else is done in its place (``_INSTEAD``), it changes nothing that is
trained (``_HARMLESS``), or it cannot be taken and is named with what to write here. A key without a value counts as not written.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from sftcli.config.foreign_names import OURS
from sftcli.paths import as_path
from sftcli.suggest import aside, did_you_mean

Content = Mapping[str, object]


class _RefusedError(Exception):
    """A value that means something that has no setting here; the text says what to do."""


@dataclass(slots=True)
class ForeignSettings:
    """What was read, by key of ours, each with the key of theirs that it is from; and what was not."""

    settings: dict[str, tuple[object, str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # their key -> why, and what to write


_Read = Callable[[object, Content], object]


def _same(value: object, content: Content) -> object:  # noqa: ARG001
    return value


def _positive(value: object, content: Content) -> object:  # noqa: ARG001
    """``-1`` and 0 stand for no limit."""
    if isinstance(value, int | float) and value <= 0:
        raise LookupError
    return value


def _listed(value: object, content: Content) -> object:  # noqa: ARG001
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _one_of(words: Mapping[object, object], advice: str = "") -> _Read:
    def read(value: object, content: Content) -> object:  # noqa: ARG001
        key = value.lower() if isinstance(value, str) else value
        if isinstance(key, list | dict) or key not in words:
            raise _RefusedError(
                advice or f"of its values only {', '.join(map(_shown, words))} are known here"
            )
        if words[key] is None:
            raise LookupError
        return words[key]

    return read


def _batch_size(value: object, content: Content) -> object:
    repeats = content.get("gradient_accumulation_steps") or 1
    if not isinstance(value, int) or not isinstance(repeats, int):
        raise _RefusedError("write the rows of a step: training.batch_size")
    return value * repeats


def _targets(value: object, content: Content) -> object:
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return ["auto"]
    return _listed(value, content)


def _share(value: object, content: Content) -> object:  # noqa: ARG001
    if isinstance(value, int | float) and not 0 <= value < 1:
        raise _RefusedError(
            "it is a number of rows: write a share, data.heldout_fraction, or name rows with --heldout"
        )
    return value


def _steps(ours: str) -> _Read:
    def read(value: object, content: Content) -> object:  # noqa: ARG001
        if isinstance(value, float) and 0 < value < 1:
            raise _RefusedError(f"it is a share of the run: write steps, {ours}")
        return value

    return read


def _sources(value: object, content: Content) -> object:  # noqa: ARG001
    """Return files and hub names; axolotl has a list of tables, LLaMA-Factory names of a registry of its own."""
    if isinstance(value, str):
        return [value]
    found = []
    for item in value if isinstance(value, list) else [value]:
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str):
            raise _RefusedError("name the rows with --data")
        if isinstance(item, dict) and (other := sorted(map(str, item.keys() - _OF_A_TABLE))):
            raise _RefusedError(f"{', '.join(other)} of {path} cannot be taken: name the rows with --data")
        found.append(path)
    return found


def _from_registry(value: object, content: Content) -> object:
    """Take files, of which LLaMA-Factory writes several with commas; its names are those of a file of its own."""
    paths = _sources(_listed(value, content), content)
    assert isinstance(paths, list)
    for path in paths:
        if not (PurePath(path).suffix[1:].isalpha() or as_path(path).exists()):
            raise _RefusedError(f"{path!r} is a name of dataset_info.json: name the files with --data")
    return paths


def _folder(value: object, content: Content) -> object:  # noqa: ARG001
    return str(PurePath(str(value)).parent)


def _last_part(value: object, content: Content) -> object:  # noqa: ARG001
    return PurePath(str(value)).name


_ADAPTERS: Mapping[object, object] = {
    True: "lora", False: None, "lora": "lora", "qlora": "lora", "dora": "dora", "full": None, "none": None, "": None,
}  # fmt: skip
_YES: Mapping[object, object] = {True: True, False: False, "true": True, "false": False}
_SCHEDULES: Mapping[object, object] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
_OPTIMIZERS: Mapping[object, object] = {
    **dict.fromkeys(_ADAMW, "adamw"), "adafactor": "adafactor", "muon": "muon", "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_OF_A_TABLE = {"path", "type", "ds_type"}  # the last two say what is found from the rows and the file's name
_MODEL_NAMES = ("model_name_or_path", "model_name", "base_model", "pretrained_model_name_or_path")
_LENGTHS = ("max_seq_length", "max_seq_len", "max_length", "cutoff_len", "sequence_len", "model_max_length")
_ROWS_AT_ONCE = ("per_device_train_batch_size", "micro_batch_size", "train_batch_size")
# Names of theirs -> our setting and how its value is read. ``LookupError`` of a reader: the value says nothing.
ROWS: tuple[tuple[tuple[str, ...], str, _Read], ...] = (
    (_MODEL_NAMES, "model.name", _same),
    (("revision", "model_revision"), "model.revision", _one_of({"main": None}, "write a commit: model.revision")),
    (("dataset_name", "datasets", "train_file", "train_data", "data_path", "dataset_path"), "data.sources", _sources),
    (("dataset",), "data.sources", _from_registry),
    (("eval_dataset",), "data.heldout_sources", _from_registry),
    (("eval_file", "validation_file", "test_datasets"), "data.heldout_sources", _sources),
    (("val_size", "val_set_size"), "data.heldout_fraction", _share),
    (_LENGTHS, "data.max_tokens", _positive),
    (("num_train_epochs", "num_epochs", "epochs"), "training.epochs", _same),
    (("max_steps",), "training.max_steps", _positive),
    (_ROWS_AT_ONCE, "training.batch_size", _batch_size),
    (_ROWS_AT_ONCE, "training.micro_batch_size", _same),
    (("learning_rate", "lr"), "training.learning_rate", _same),
    (("lr_scheduler_type", "lr_scheduler"), "training.schedule", _one_of(_SCHEDULES)),
    (("warmup_ratio",), "training.warmup_fraction", _same),
    (("warmup_steps",), "training.warmup_steps", _positive),
    (("weight_decay",), "training.weight_decay", _same),
    (("adam_beta1",), "training.beta1", _same),
    (("adam_beta2",), "training.beta2", _same),
    (("adam_epsilon",), "training.epsilon", _same),
    (("max_grad_norm", "gradient_clipping"), "training.max_grad_norm", _same),
    (("optim", "optimizer"), "training.optimizer", _one_of(_OPTIMIZERS, "here it is --set training.optimizer=NAME")),
    (("bf16",), "training.precision", _one_of({True: "bf16", False: None, "auto": "auto", "true": "bf16", "false": None})),
    (("fp16",), "training.precision", _one_of({True: "fp16", False: None, "auto": "auto", "true": "fp16", "false": None})),
    (("torch_dtype", "dtype"), "training.precision", _one_of({"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto"})),
    (("tf32",), "training.tf32", _one_of(_YES)),
    (("full_determinism",), "training.deterministic", _one_of(_YES)),
    (("packing", "sample_packing"), "training.packing", _one_of({True: "on", False: "off", "auto": "auto"})),
    (("gradient_checkpointing",), "training.gradient_checkpointing", _one_of(_YES)),
    (("neftune_noise_alpha",), "training.neftune_alpha", _same),
    (("loss_type",), "training.loss", _one_of({"nll": "nll", "dft": "dft", "chunked_nll": "nll"})),
    (("use_dft_loss",), "training.loss", _one_of({True: "dft", False: None})),
    (("router_aux_loss_coef",), "training.router_aux_loss", _same),
    (("attn_implementation",), "model.attention", _same),
    (("logging_steps",), "training.log_every_steps", _steps("training.log_every_steps")),
    (("eval_steps",), "training.eval_every_steps", _steps("--eval-every N")),
    (("save_steps",), "checkpoint.every_steps", _steps("--save-every N")),
    (("save_total_limit",), "checkpoint.keep_last", _same),
    (("seed",), "training.seed", _same),
    (("use_peft", "use_lora", "adapter", "finetuning_type"), "adapter.kind", _one_of(_ADAPTERS, "here it is --adapter NAME")),
    (("load_in_4bit",), "adapter.quantize", _one_of({True: "4bit", False: None})),
    (("quantization_bit",), "adapter.quantize", _one_of({4: "4bit"}, "only 4 bits are offered: --adapter qlora")),
    (("lora_r", "lora_rank", "peft_lora_r"), "adapter.rank", _same),
    (("lora_alpha",), "adapter.alpha", _same),
    (("lora_dropout",), "adapter.dropout", _same),
    (("lora_target_modules", "lora_target", "target_modules"), "adapter.target_modules", _targets),
    (("lora_target_linear",), "adapter.target_modules", _one_of({True: ["auto"], False: None})),
    (("use_rslora", "peft_use_rslora"), "adapter.rslora", _one_of(_YES)),
    (("output_dir",), "run.root", _folder),
    (("output_dir",), "run.name", _last_part),
    (("report_to",), "run.trackers", _one_of({"none": None, "wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"]}, "here it is --track TRACKER")),
)  # fmt: skip
# They change nothing that is trained, or what they ask for is done anyway. A name that ends in ``_`` stands for all that begin so.
_HARMLESS = (
    "gradient_accumulation_steps", "run_name", "logging_", "wandb_", "mlflow_", "hub_", "dataloader_", "ddp_", "plot_loss",
    "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers", "dataset_num_proc", "dataset_processes",
    "dataset_prepared_path", "remove_unused_columns", "per_device_eval_batch_size", "eval_batch_size", "disable_tqdm",
    "flash_attention", "flash_attn", "sdp_attention", "xformers_attention", "low_cpu_mem_usage", "use_cache",
    "pad_to_sequence_len", "gradient_checkpointing_kwargs", "save_safetensors", "save_only_model", "model_type", "tokenizer_type",
    "dataset_dir", "include_", "eval_on_start", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "debug",
    "verbose", "local_rank", "strict", "length_column_name", "use_fast_tokenizer", "plugins", "liger_", "use_liger",
    "use_liger_kernel",
)  # fmt: skip
# What must have this value, or nothing, to say what is done here anyway; else it is told what to do.
_EXPECTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "stage": (("sft",), "only supervised fine-tuning is done here"),
    "do_train": ((True,), "to score a model: sft eval"),
    "do_eval": ((True, False), "it is true or false, and changes nothing here: --eval-every N"),
    "train_on_inputs": ((False,), "only answers are trained; whole texts: data.text_sources"),
    "completion_only_loss": ((True,), "only answers are trained; whole texts: data.text_sources"),
    "assistant_only_loss": ((True,), "only answers are trained; whole texts: data.text_sources"),
    "eval_strategy": (("steps", "no", False), "here it is --eval-every N"),
    "evaluation_strategy": (("steps", "no", False), "here it is --eval-every N"),
    "save_strategy": (("steps", "no", False), "here it is --save-every N"),
    "load_in_8bit": ((False,), "8 bits are not offered: --adapter qlora keeps 4"),
    "trust_remote_code": ((False,), "it has to be typed: --trust-remote-code --set model.revision=COMMIT"),
    "use_dora": ((False,), "here it is --adapter dora"),
    "push_to_hub": ((False,), "a finished run is uploaded with: sft push NAME RUN"),
    "resume_from_checkpoint": ((False,), "sft resume RUN, or --resume auto"),
    "group_by_length": (
        (False, True),
        "it is true or false, and changes nothing here: --set training.packing=on",
    ),
}
_EVALUATED = "held-out rows are scored as training.eval_every_steps says: --eval-every N"
_SAVED = "checkpoints are saved as checkpoint.every_minutes says, and at the end: --save-every N"
# What is done in place of what some values ask for, by key; ``None`` stands for any value.
_INSTEAD: Mapping[str, tuple[object, str]] = {
    "template": (None, "the model's own chat template is used: --template NAME"),  # a name of LLaMA-Factory's
    "eval_strategy": ("epoch", _EVALUATED),
    "evaluation_strategy": ("epoch", _EVALUATED),
    "save_strategy": ("epoch", _SAVED),
}
_KNOWN = {name for names, *_ in ROWS for name in names} | _EXPECTED.keys() | OURS.keys() | _INSTEAD.keys()


def is_foreign(content: Content) -> bool:
    """Return whether ``content`` has a key that other trainers have."""
    return any(key in _KNOWN for key in content)


def read_foreign(content: Content, typed: Container[str] = ()) -> ForeignSettings:
    """Read the keys of ``content`` that have a value; what cannot be taken does no harm where its settings are ``typed``."""
    found = ForeignSettings()
    given = {key: value for key, value in content.items() if value not in (None, "", [], {})}
    for key, value in given.items():
        rows = [(ours, read) for names, ours, read in ROWS if key in names]
        for ours, read in rows:
            _take(found, key, value, ours, read, given)
        if rows and all(ours in typed for ours, _ in rows):
            found.refused.pop(key, None)
            found.ignored.append(f"{key} (the command line has {', '.join(ours for ours, _ in rows)})")
        elif not rows:
            _take_word(found, key, value)
    for key in list(_needless(found)):
        _, theirs = found.settings.pop(key)
        found.ignored += [theirs] if theirs not in {name for _, name in found.settings.values()} else []
    return found


def _take_word(found: ForeignSettings, key: str, value: object) -> None:
    """Take in a key that is no setting here."""
    asked, instead = _INSTEAD.get(key, ("", ""))
    values, advice = _EXPECTED.get(key, ((), ""))
    if instead and asked in (None, value):
        found.ignored.append(f"{key} ({instead})")
    elif value in values or (_is_harmless(key) and key not in _EXPECTED):
        found.ignored.append(key)
    elif advice or key in OURS:
        found.refused[key] = advice or f"here it is {OURS[key]}"
    else:
        found.refused[key] = f"there is no such setting here{aside(did_you_mean(key, sorted(_KNOWN)))}"


def _take(found: ForeignSettings, key: str, value: object, ours: str, read: _Read, given: Content) -> None:
    try:
        taken = read(value, given)
    except LookupError:
        found.ignored.append(key)
    except _RefusedError as refused:
        found.refused[key] = str(refused)
    else:
        earlier, theirs = found.settings.setdefault(ours, (taken, key))
        if earlier != taken:
            found.refused[key] = f"{theirs} says something else"
        elif theirs != key:
            found.ignored.append(f"{key} ({theirs} says the same)")
        if value == "qlora":
            found.settings.setdefault("adapter.quantize", ("4bit", key))


def _needless(found: ForeignSettings) -> Iterator[str]:
    """Yield settings that mean nothing beside the others: the shape of an adapter where there is none, a folder that is here."""
    if "adapter.kind" not in found.settings:
        yield from (key for key in found.settings if key.startswith("adapter."))
    if found.settings.get("run.root", ("", ""))[0] == ".":
        yield "run.root"


def _is_harmless(key: str) -> bool:
    return any(key == name or (name.endswith("_") and key.startswith(name)) for name in _HARMLESS)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
