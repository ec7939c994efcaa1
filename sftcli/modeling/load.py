"""Bring a model folder into memory whole or not at all, and write one that plain transformers opens."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sftcli import storage
from sftcli.errors import DataError, MismatchError, ResourceError, UsageError
from sftcli.modeling.cache import whole_folder
from sftcli.modeling.folder import check_model_folder, read_json
from sftcli.modeling.modern_lm import register
from sftcli.modeling.remote_code import copy_code, refuse_code

_SHOWN = 3
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_TEMPLATE_FOLDER = "additional_chat_templates"
_MACHINE_KEYS = (
    "_name_or_path",
    "name_or_path",
    "_model_name_or_path",
    "is_local",
    "local_files_only",
    "auto_map",
)


def quiet_libraries() -> None:
    """Turn off progress bars and keep warnings and logs of libraries off the terminal.

    They still reach a handler on the root logger, such as that of a log file. May be called any number of times.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.captureWarnings(capture=True)
    for name in ("transformers", "huggingface_hub", "accelerate", "gguf", "bitsandbytes", "py.warnings"):
        logger = logging.getLogger(name)
        for handler in [*logger.handlers]:
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        logger.propagate = (
            logging.getLogger().hasHandlers()
        )  # else logging's last resort would write to stderr


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many numbers the model holds and how many of them train; a shared tensor counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    trusts_code: bool = False,
) -> PreTrainedModel:
    """Load every tensor of the model in ``folder`` as ``dtype`` on ``device``, in evaluation mode.

    Opens no pickle file, asks no network, and runs no code from the folder unless ``trusts_code`` (``remote_code.allow_code``).

    Raises:
        NotFoundError, UsageError: The folder is no model folder (see ``check_model_folder``).
        ConsentError: The folder brings its own model code, or only pickle weights.
        DataError: A file is damaged, or the model is of a kind that transformers does not know.
        MismatchError: Tensors are missing, left over, or have other shapes than the configuration says.
        ResourceError: The device's memory is too small.
        UsageError: Gradient checkpointing is asked for and the model's code knows none.
    """
    quiet_libraries()
    check_model_folder(folder)
    if not trusts_code:
        refuse_code(folder)
    model, info = _from_pretrained(folder, dtype, attention, trusts_code=trusts_code)
    _refuse_partial(folder, info)
    _train_every_embedding(model)
    try:
        torch.nn.Module.to(model, device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the model does not fit into the memory of {device}",
            hint="choose a smaller model or a larger device",
        ) from error
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each layer for the backward pass and compute the rest again there.

    Raises:
        UsageError: The model's code cannot do that.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(model).__name__} knows no gradient checkpointing",
            hint="leave training.gradient_checkpointing false",
        )
    newer = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def write_model_files(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: Path,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what a model folder holds beside its weights: configuration, generation settings, tokenizer, template.

    Args:
        model: Its configuration is written; nothing about it is changed.
        folder: Exists already.
        source: The model folder that the tokenizer files are copied from.
        stop_ids: Tokens that end an answer; added to those of the model.
        template: Jinja text to write in place of the templates of ``source``.
        dtype: What the configuration says that the weights are.
    """
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", _without_machine(config) | copy_code(model, source, folder))
    if model.can_generate() and isinstance(model.generation_config, GenerationConfig):
        _write_json(
            folder / "generation_config.json", _generation_settings(model.generation_config, stop_ids)
        )
    copy_tokenizer(source, folder)
    if template is not None:
        # A template for tools beside it would go before it in rows that list some.
        storage.try_remove_tree(folder / _TEMPLATE_FOLDER)
        storage.write_file(folder / "chat_template.jinja", [template.encode("utf-8")])


def save_model_folder(
    model: PreTrainedModel,
    *,
    source: Path,
    folder: Path,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
    hint: str = "choose another run.root or output folder",
) -> None:
    """Write ``model`` to ``folder`` so that it is there whole or not at all; an older folder is replaced.

    Args:
        model: The model; left as it is.
        source: The folder that the model was loaded from; its tokenizer files are copied.
        folder: Where to.
        stop_ids: Tokens that end an answer; added to those of the model.
        template: Jinja text to write in place of the templates of ``source``.
        dtype: Of the weights written; None takes that of ``source``.
        texts: More files, by name.
        hint: What to do where writing fails.

    Raises:
        StorageError: The disk is full.
        OutputError: The place is not writable.
    """
    dtype = dtype or stored_dtype(source)
    with whole_folder(folder, hint=hint) as fresh:
        settings, stored = model.generation_config, model.config.dtype
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # theirs may fail validation
        try:
            tensors = _cast(model.state_dict(), dtype)
            storage.disk.let_library_write(
                fresh, lambda: model.save_pretrained(fresh, state_dict=tensors, max_shard_size="5GB")
            )
        finally:
            model.generation_config, model.config.dtype = settings, stored
        write_model_files(model, fresh, source=source, stop_ids=stop_ids, template=template, dtype=dtype)
        for name, text in (texts or {}).items():
            storage.write_file(fresh / name, [text.encode("utf-8")])
        for weights in fresh.glob("*.safetensors"):
            storage.disk.copy_mode(
                fresh / "config.json", weights
            )  # safetensors makes files that others cannot read


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files and chat templates of a model folder; paths of this machine are left out."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            storage.copy_file(source / name, folder / name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        storage.make_folders(folder / _TEMPLATE_FOLDER)
        for template in sorted((source / _TEMPLATE_FOLDER).glob("*.jinja")):
            storage.copy_file(template, folder / _TEMPLATE_FOLDER / template.name)
    path = folder / "tokenizer_config.json"
    if path.is_file() and any(key in (content := read_json(path)) for key in _MACHINE_KEYS):
        _write_json(path, _without_machine(content))


def _from_pretrained(
    folder: Path, dtype: torch.dtype, attention: str, *, trusts_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    register()
    try:
        loaded: object = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the shapes can be named; nothing mismatched is let through
            output_loading_info=True,
            trust_remote_code=trusts_code,
            local_files_only=True,
        )
    except ImportError as error:
        raise UsageError(f"attention {attention!r} cannot be used here: {_first_line(error)}") from error
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        raise DataError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)


def _train_every_embedding(model: PreTrainedModel) -> None:
    """Let the padding token's embedding learn: where it is the stop token as well, as in SmolLM2, it stands in every row.

    torch leaves the gradient of ``padding_idx`` out. Real padding has no loss and gives no gradient anyway.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None


def _refuse_partial(folder: Path, info: Mapping[str, Any]) -> None:
    config = folder / "config.json"
    if shapes := sorted(info["mismatched_keys"]):
        named = [f"{name} is {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in shapes]
        raise MismatchError(f"{config} and the weights disagree about shapes: {_some(named)}")
    if missing := sorted(info["missing_keys"]):
        raise MismatchError(f"the weights in {folder} lack tensors that {config} asks for: {_some(missing)}")
    if extra := sorted(info["unexpected_keys"]):
        raise MismatchError(
            f"the weights in {folder} hold tensors that {config} has no place for: {_some(extra)}"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Convert floating-point tensors; names that share memory go on sharing it, so that it is written once."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in made:
            made[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result[name] = made[key]
    return result


def _generation_settings(settings: GenerationConfig, stop_ids: Iterable[int]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(settings.to_json_string(use_diff=True))
    known = content.get("eos_token_id")
    ends = [*known] if isinstance(known, list) else [] if known is None else [known]
    ends += [stop for stop in sorted(stop_ids) if stop not in ends]
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return _without_machine(content)


def stored_dtype(source: Path) -> torch.dtype:
    """Return the dtype that a model folder says its weights have; float32 where it does not."""
    config = read_json(source / "config.json")
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _without_machine(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _MACHINE_KEYS}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    storage.write_file(path, [text.encode("utf-8")])
