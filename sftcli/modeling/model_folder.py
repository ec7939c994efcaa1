"""Write a model folder that plain transformers opens, there whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sftcli import storage
from sftcli.modeling.cache import whole_folder
from sftcli.modeling.folder import read_json
from sftcli.modeling.older_config import with_keys_of, with_older_keys, with_older_tokenizer_keys
from sftcli.modeling.remote_code import copy_code

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


def write_model_files(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: Path,
    tokenizer: Path | None = None,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what a model folder holds beside its weights: configuration, generation settings, tokenizer, template.

    Args:
        model: Its configuration is written; nothing about it is changed.
        folder: Exists already.
        source: The folder that the model was loaded from.
        tokenizer: The folder that the tokenizer files are copied from, where that is another one.
        stop_ids: Tokens that end an answer; added to those of the model.
        template: Jinja text to write in place of the templates of the tokenizer.
        dtype: What the configuration says that the weights are.
    """
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if has_own_head(model):
        # The file it came from says otherwise; readers that believe it would put the embeddings in place of the head.
        config["tie_word_embeddings"] = False
    config = with_keys_of(read_json(source / "config.json"), with_older_keys(config))
    _write_json(folder / "config.json", _without_machine(config) | copy_code(model, source, folder))
    write_companions(model, folder, source=tokenizer or source, stop_ids=stop_ids, template=template)


def has_own_head(model: PreTrainedModel) -> bool:
    """Tell whether the head has numbers of its own although the configuration says that it is the embeddings."""
    says_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return says_tied and bool(model._tied_weights_keys) and not model.all_tied_weights_keys


def write_companions(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: Path,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
) -> None:
    """Write generation settings, tokenizer and template; as ``write_model_files``, which adds the configuration."""
    if model.can_generate() and isinstance(model.generation_config, GenerationConfig):
        _write_json(
            folder / "generation_config.json", _generation_settings(model.generation_config, stop_ids)
        )
    copy_tokenizer(source, folder, takes_types="token_type_ids" in signature(model.forward).parameters)
    if template is not None:
        # A template for tools beside it would go before it in rows that list some.
        storage.try_remove_tree(folder / _TEMPLATE_FOLDER)
        storage.write_file(folder / "chat_template.jinja", [template.encode("utf-8")])


def save_model_folder(
    model: PreTrainedModel,
    *,
    source: Path,
    folder: Path,
    tokenizer: Path | None = None,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
    hint: str = "choose another run.root or output folder",
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``model`` to ``folder`` so that it is there whole or not at all; an older folder is replaced.

    Args:
        model: The model; left as it is.
        source: The folder that the model was loaded from; its tokenizer files are copied.
        folder: Where to.
        tokenizer: The folder whose tokenizer files are copied, where that is another one.
        stop_ids: Tokens that end an answer; added to those of the model.
        template: Jinja text to write in place of the templates of the tokenizer.
        dtype: Of the weights written; None takes that of ``source``.
        texts: More files, by name.
        hint: What to do where writing fails.
        weights: Whole ones by name, where ``model`` holds parts of them only.

    Raises:
        StorageError: The disk is full.
        OutputError: The place is not writable.
    """
    dtype = dtype or stored_dtype(source)
    with whole_folder(folder, hint=hint) as fresh:
        settings, stored = model.generation_config, model.config.dtype
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # theirs may fail validation
        try:
            tensors = _cast(model.state_dict() if weights is None else weights, dtype)
            storage.disk.let_library_write(
                fresh, lambda: model.save_pretrained(fresh, state_dict=tensors, max_shard_size="5GB")
            )
        finally:
            model.generation_config, model.config.dtype = settings, stored
        write_model_files(
            model,
            fresh,
            source=source,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            template=template,
            dtype=dtype,
        )
        for name, text in (texts or {}).items():
            storage.write_file(fresh / name, [text.encode("utf-8")])
        for path in fresh.glob("*.safetensors"):
            storage.disk.copy_mode(
                fresh / "config.json", path
            )  # safetensors makes files that others cannot read


def copy_tokenizer(source: Path, folder: Path, *, takes_types: bool = False) -> None:
    """Copy the tokenizer files and chat templates of a model folder; paths of this machine are left out.

    ``takes_types`` is as in ``with_older_tokenizer_keys``.
    """
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            storage.copy_file(source / name, folder / name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        storage.make_folders(folder / _TEMPLATE_FOLDER)
        for template in sorted((source / _TEMPLATE_FOLDER).glob("*.jinja")):
            storage.copy_file(template, folder / _TEMPLATE_FOLDER / template.name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        content = read_json(path)
        portable = with_older_tokenizer_keys(_without_machine(content), takes_types=takes_types)
        if portable != content:
            _write_json(path, portable)


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
