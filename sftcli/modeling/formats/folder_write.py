"""Write a model folder atomically, so that plain transformers opens it as the original model class."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sftcli import storage
from sftcli.errors import DataError
from sftcli.json_files import read_json, write_json
from sftcli.modeling.architecture import beside_text, opens_whole
from sftcli.modeling.formats.folder_check import INDEX
from sftcli.modeling.formats.older_config import with_keys_of, with_older_keys, with_older_tokenizer_keys
from sftcli.modeling.formats.remote_code import copy_code
from sftcli.modeling.formats.source_tensors import SourceTensors
from sftcli.modeling.formats.stored_tensors import (
    StoredTensor,
    copied_file_parts,
    in_parts,
    index_of,
    shard_name,
    stored_tensors,
)
from sftcli.modeling.formats.streamed import names_to_stream, write_streamed
from sftcli.modeling.formats.written import check_model_written
from sftcli.runtime import is_finite

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_SHARD_BYTES = 5 * 10**9
TEMPLATE_FOLDER = "additional_chat_templates"
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
    """Write the files of a model folder besides its weights: configuration, generation settings, tokenizer, template.

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
        for section in sections(config):
            section["tie_word_embeddings"] = False
    config = with_keys_of(read_json(source / "config.json"), with_older_keys(config))
    write_json(folder / "config.json", _without_machine(config) | copy_code(model, source, folder))
    for file in _PROCESSOR_FILES:  # what turns images and sound into the input of a model
        if (source / file).is_file():
            storage.copy_file(source / file, folder / file)
    write_companions(model, folder, source=tokenizer or source, stop_ids=stop_ids, template=template)


def sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a model's configuration, and within it that of its language model where it has one of its own."""
    return [section for section in (config, config.get("text_config")) if isinstance(section, dict)]


def has_own_head(model: PreTrainedModel) -> bool:
    """Return whether the head is untied although the configuration says that it is tied to the embeddings."""
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
        write_json(folder / "generation_config.json", _generation_settings(model.generation_config, stop_ids))
    copy_tokenizer(source, folder, takes_types="token_type_ids" in signature(model.forward).parameters)
    if template is not None:
        # A template for tools beside it would go before it in rows that list some.
        storage.try_remove_tree(folder / TEMPLATE_FOLDER)
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
    unchanged: Collection[str] = (),
    is_new: bool = False,
    check: Callable[[Path], None] | None = None,
    streams: bool = False,
) -> None:
    """Write ``model`` to ``folder`` atomically; an older folder is replaced, or with ``is_new`` refused.

    What lies beside the model in the folder that it was loaded from, such as a vision tower, is written as it lies there.
    The new folder is read again and compared with what was to be written.

    Args:
        model: The model; left as it is.
        source: The folder that the model was loaded from.
        folder: Where to.
        tokenizer: The folder whose tokenizer files are copied, where that is another one.
        stop_ids: Tokens that end an answer; added to those of the model.
        template: Jinja text to write in place of the templates of the tokenizer.
        dtype: Of the weights written; None takes for each that of ``source``.
        texts: More files, by name.
        hint: What to do where writing fails.
        weights: By the names of parameters, where others are to be written than ``model`` computes with.
        unchanged: Names of tensors that are no others than those in ``source``, which is proved.
        is_new: Whether nothing may be there.
        check: Looks at the folder before it gets its name, which it does not where this raises.
        streams: Whether ``weights`` are in files, and no more than one of them is to be in memory, if files hold them as they are.

    Raises:
        StorageError: The disk is full, or the folder is not what was to be written.
        OutputError: The place is not writable.
        DataError: The weights are too large for their type.
    """
    origin = SourceTensors.of(model, source)
    known, other = origin.dtypes(), stored_dtype(source)
    state = {
        name: (tensor, dtype or known.get(name, other))
        for name, tensor in whole_state(model, weights).items()
        if name not in (model._keys_to_ignore_on_save or ())  # the class computes them, and files have none
    }
    shapes = {name: tensor.shape for name, (tensor, _) in state.items()}
    streamed = names_to_stream(model, shapes) if streams else None
    tensors = _cast(state) if streamed is None else _Rounded(state)
    with storage.atomic_folder(folder, hint=hint, is_new=is_new) as fresh:
        if streamed is None:
            _let_library_write(model, fresh, tensors)
        else:
            about = {name: (_dtype_of(*state[name]), shapes[name]) for name in streamed}
            write_streamed(fresh, tensors, about, _SHARD_BYTES)
        write_model_files(
            model,
            fresh,
            source=source,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            template=template,
            dtype=dtype or other,
        )
        is_part = bool(origin.beside) and is_part_of_whole(model, source)
        if is_part:
            _write_whole_configuration(model, fresh, source, dtype=dtype or other)
        if origin.beside:
            _add_tensors(fresh, origin.beside)
        for name, text in (texts or {}).items():
            storage.write_file(fresh / name, [text.encode("utf-8")])
        for path in fresh.glob("*.safetensors"):
            storage.disk.copy_mode(
                fresh / "config.json", path
            )  # safetensors makes files that others cannot read
        check_model_written(
            fresh,
            model,
            tensors,
            origin,
            unchanged={*unchanged, *beside_text(model)},
            is_whole=is_part or opens_whole(model),
            memory={name: (tensor.data_ptr(), tensor.shape) for name, (tensor, _) in state.items()},
        )
        if check is not None:
            check(fresh)


def _let_library_write(model: PreTrainedModel, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    settings, stored = model.generation_config, model.config.dtype
    model.generation_config = GenerationConfig()  # theirs may fail validation
    try:
        storage.disk.let_library_write(
            folder,
            lambda: model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=_SHARD_BYTES),
        )
    finally:
        model.generation_config, model.config.dtype = settings, stored


def whole_state(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return all that files of ``model`` hold, with ``weights`` in place of the parameters of these names.

    A parameter with several names, as a head that is tied to the embeddings, is the same tensor under each.
    """
    if weights is None:
        return dict(model.state_dict())
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: weights.get(names.get(name, name), tensor) for name, tensor in model.state_dict().items()}


def is_part_of_whole(model: PreTrainedModel, source: Path) -> bool:
    """Return whether ``model`` is the language model of a larger one in ``source``."""
    return read_json(source / "config.json").get("model_type") != model.config.model_type


def _write_whole_configuration(
    model: PreTrainedModel, folder: Path, source: Path, *, dtype: torch.dtype
) -> None:
    """Write the configuration of the larger model."""
    config = with_older_keys(_without_machine(read_json(source / "config.json")))
    name = str(dtype).removeprefix("torch.")
    for section in sections(config):
        section.update({key: name for key in ("dtype", "torch_dtype") if key in section})
        if has_own_head(model):
            section["tie_word_embeddings"] = False
    write_json(folder / "config.json", config | copy_code(model, source, folder))


def _add_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Add tensors of other files to a model folder, as shards of their own."""
    there = stored_tensors(folder)
    old = sorted({tensor.path for tensor in there.values()})
    groups = list(in_parts(tensors, _SHARD_BYTES))
    count = len(old) + len(groups)
    names = [shard_name("model.safetensors", number, count) for number in range(count)]
    renamed = dict(zip(old, names[: len(old)], strict=True))
    for path in reversed(old):  # the last has the highest new number, so none is in the way of another
        storage.disk.rename(path, folder / renamed[path])
    places = {name: renamed[tensor.path] for name, tensor in there.items()}
    for name, group in zip(names[len(old) :], groups, strict=True):
        storage.write_file(folder / name, copied_file_parts(group))
        places |= dict.fromkeys(group, name)
    size = sum(tensor.end - tensor.begin for tensor in (*there.values(), *tensors.values()))
    write_json(folder / INDEX, index_of(places, size))


def copy_tokenizer(source: Path, folder: Path, *, takes_types: bool = False) -> None:
    """Copy the tokenizer files and chat templates of a model folder; paths of this machine are left out.

    ``takes_types`` is as in ``with_older_tokenizer_keys``.
    """
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            storage.copy_file(source / name, folder / name)
    if (source / TEMPLATE_FOLDER).is_dir():
        storage.make_folders(folder / TEMPLATE_FOLDER)
        for template in sorted((source / TEMPLATE_FOLDER).glob("*.jinja")):
            storage.copy_file(template, folder / TEMPLATE_FOLDER / template.name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        content = read_json(path)
        portable = with_older_tokenizer_keys(_without_machine(content), takes_types=takes_types)
        if portable != content:
            write_json(path, portable)


def _cast(tensors: Mapping[str, tuple[torch.Tensor, torch.dtype]]) -> dict[str, torch.Tensor]:
    """Convert floating-point tensors; names that share memory go on sharing it, so that it is written once.

    Raises:
        DataError: Numbers are too large for the type.
    """
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, (tensor, dtype) in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in made:
            made[key] = _rounded(name, tensor, dtype) if tensor.is_floating_point() else tensor
        result[name] = made[key]
    return result


class _Rounded(Mapping[str, torch.Tensor]):
    """As ``_cast``, with each tensor converted when it is asked for, and not kept."""

    def __init__(self, tensors: Mapping[str, tuple[torch.Tensor, torch.dtype]]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor, dtype = self._tensors[name]
        return _rounded(name, tensor, dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _dtype_of(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor once it is converted to ``dtype``."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.detach().to(dtype)
    if not is_finite(rounded):
        word = str(dtype).removeprefix("torch.")
        raise DataError(
            f"{name} holds non-finite values in {word}",
            hint="export another dtype: sft export NAME --to hf --dtype bf16 --out FOLDER",
        )
    return rounded


def _generation_settings(settings: GenerationConfig, stop_ids: Iterable[int]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(settings.to_json_string(use_diff=True))
    known = content.get("eos_token_id")
    ends = [*known] if isinstance(known, list) else [] if known is None else [known]
    ends += [stop for stop in sorted(stop_ids) if stop not in ends]
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return _without_machine(content)


def stored_dtype(source: Path) -> torch.dtype:
    """Return the dtype recorded in a model folder; float32 if none is."""
    config = read_json(source / "config.json")
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def exact_dtype(source: Path) -> torch.dtype:
    """Return the dtype that rounds nothing in a model folder: that of all its tensors, or float32 if they differ."""
    kinds = {tensor.dtype for tensor in stored_tensors(source).values()} & {"F64", "F32", "BF16", "F16"}
    only = kinds.pop() if len(kinds) == 1 else ""
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(only, torch.float32)


def _without_machine(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _MACHINE_KEYS}
