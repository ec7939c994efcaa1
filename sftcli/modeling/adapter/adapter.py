"""Adapters inside a model in memory: add new ones, load them from a folder, merge them. The only module that imports peft.

The layers of peft are put into the model in place: it keeps its class, its head and its names, and everything that
works on the model works on it with an adapter.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.errors import DataError, MismatchError
from sftcli.modeling.adapter.folder import (
    AdapterBase,
    LoraForm,
    check_adapter_weights,
    read_base,
    read_form,
)
from sftcli.modeling.adapter.targets import (
    ADAPTER_NAME,
    PREFIX,
    ROWS,
    file_name,
    matching_layers,
    name_of_embedding,
    name_of_head,
    refuse_tied,
    target_names,
    token_rows,
)
from sftcli.modeling.formats.identity import numbers_hash
from sftcli.modeling.load import load_model

_MATRIX = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_embedding_A)")
_SHOWN = 3


def add_adapter(
    model: PreTrainedModel, settings: AdapterSettings, *, new_ids: Collection[int] = ()
) -> dict[str, object]:
    """Put a new adapter into ``model``, the only part of it that trains from then on; it adds nothing yet.

    The rows of the tokens ``new_ids`` belong to it, in token embeddings and head.

    Returns:
        The configuration that peft needs to read the weights, without the base's name.

    Raises:
        UsageError: ``settings`` name a layer that the model does not have, or its tied head; or peft cannot have rows of tokens.
    """
    import peft

    targets = target_names(model, settings.target_modules)
    dora = settings.kind is AdapterKind.DORA
    transposed = any(isinstance(layer, Conv1D) for layer in matching_layers(model, targets).values())
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "use_rslora": settings.rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": transposed,
    }
    if rows := token_rows(model, new_ids, targets):
        config["trainable_token_indices"] = rows
    _inject(model, config)
    return {**config, "inference_mode": True, "peft_version": peft.__version__}


def check_base(folder: Path, base: Path) -> None:
    """Compare the model folder ``base`` with the base that the adapter in ``folder`` records.

    Raises:
        MismatchError: It is another model.
    """
    wanted: AdapterBase = read_base(folder)
    if wanted.content not in (None, numbers_hash(base)):
        raise MismatchError(
            f"the adapter {folder} was trained on other weights of {wanted.name} than those in {base}",
            hint="restore the weights it was trained on, or train a new adapter",
        )


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter in ``folder`` into ``model``, in float32, in evaluation mode; nothing trains.

    No class, module, path or pattern that the folder's configuration names is used: layers and ranks come from the
    weights.

    Raises:
        ConsentError: The weights are a pickle file.
        NotFoundError, DataError: A file is missing or damaged.
        UsageError: It is no adapter of a kind that is known.
        MismatchError: It does not fit the model.
    """
    form = read_form(folder)
    tensors = load_file(check_adapter_weights(folder))
    if strange := sorted(name for name in tensors if not name.startswith(PREFIX)):
        raise DataError(f"{folder} holds {strange[0]!r}, which is not an adapter tensor")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    rows = {name.removesuffix(ROWS): tensors.pop(name) for name in sorted(tensors) if name.endswith(ROWS)}
    _replace_rows(model, rows, form.token_ids, folder)
    plain = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    _replace_plain(model, plain, folder)
    ranks = {
        found["layer"]: int(tensor.shape[0])
        for name, tensor in tensors.items()
        if (found := _MATRIX.fullmatch(name)) and tensor.ndim == 2
    }
    layers = dict(model.named_modules())
    if missing := sorted(ranks.keys() - layers.keys()):
        raise MismatchError(f"{folder} is for another model: this one has no layer {_some(missing)}")
    for layer in ranks.keys() & {name_of_head(model), name_of_embedding(model)}:
        refuse_tied(model, layer)
    if ranks:
        _inject(model, _config_for(ranks, form))
    _fill(model, {name: tensors[name] for name in tensors.keys() - plain.keys()}, folder)
    model.requires_grad_(False)
    model.train(False)


def merge_adapter(
    folder: Path,
    *,
    base: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trusts_code: bool = False,
) -> PreTrainedModel:
    """Return the model in ``base`` with the adapter in ``folder`` merged into its weights: an ordinary full model.

    Args:
        folder: An adapter's folder.
        base: The model folder that it belongs to; see ``services.models.ModelChoice.weights_folder``.
        dtype: Of the model returned. Sums are made in float32, layer by layer, and rounded once.
        device: Where to; None is the CPU.
        trusts_code: As in ``load_model``, of ``base``.

    Raises:
        MismatchError: ``base`` is another model than the one the adapter was trained on.
        ConsentError, NotFoundError, DataError, UsageError: As in ``load_adapter`` and ``load_model``.
    """
    check_base(folder, base)
    model = load_model(base, dtype=dtype, device=device or torch.device("cpu"), trusts_code=trusts_code)
    load_adapter(model, folder)
    merge_in_place(model)
    return model


def merge_in_place(model: PreTrainedModel) -> None:
    """Work an adapter into the weights of ``model`` and take its layers out.

    Raises:
        DataError: The sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base, weight = layer.get_base_layer(), cast("nn.Parameter", layer.weight)
        dtype = weight.dtype
        cast("nn.Module", layer).float()
        layer.merge()
        if not torch.isfinite(weight).all():
            raise DataError(f"merging gives non-finite values in {name}", hint="train it again")
        base.to(dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    vars(model).pop("peft_config", None)


def _inject(model: PreTrainedModel, config: Mapping[str, object]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    known = {key: value for key, value in config.items() if key != "peft_type"}
    inject_adapter_in_model(LoraConfig(**cast("dict[str, Any]", known)), model, adapter_name=ADAPTER_NAME)


def _config_for(ranks: Mapping[str, int], form: LoraForm) -> dict[str, object]:
    first = next(iter(ranks.values()))
    return {
        "r": first,
        "rank_pattern": {re.escape(layer): rank for layer, rank in ranks.items() if rank != first},
        "lora_alpha": form.alpha,
        "use_rslora": form.rslora,
        "use_dora": form.dora,
        "fan_in_fan_out": form.fan_in_fan_out,
        "lora_bias": form.bias,
        "target_modules": list(ranks),
    }


@torch.no_grad()
def _fill(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    places = {
        file_name(name).removeprefix(PREFIX): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    if missing := sorted(places.keys() - tensors.keys()):
        raise MismatchError(f"{folder} lacks tensors that its configuration requires: {_some(missing)}")
    if extra := sorted(tensors.keys() - places.keys()):
        raise MismatchError(f"{folder} holds tensors that the model does not have: {_some(extra)}")
    for name, parameter in places.items():
        _check_shape(parameter, tensors[name], name, folder)
        parameter.data = tensors[name].to(parameter.device, torch.float32)


@torch.no_grad()
def _replace_plain(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Set whole tensors that were trained with the adapter (biases, modules to save), before it is put in."""
    places = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in places:
            raise MismatchError(f"{folder} holds tensors that the model does not have: {name}")
        if name in {f"{layer}.weight" for layer in (name_of_head(model), name_of_embedding(model))}:
            refuse_tied(model, name)
        _check_shape(places[name], tensor, name, folder)
        places[name].copy_(tensor)


@torch.no_grad()
def _replace_rows(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    ids: Mapping[str, Sequence[int]],
    folder: Path,
) -> None:
    """Set the rows of tokens that were trained with the adapter, by layer, before it is put in."""
    layers = {name_of_embedding(model), name_of_head(model)}
    for name, tensor in tensors.items():
        wanted = ids.get("") if name == name_of_embedding(model) else None
        wanted = next((ids[part] for part in ids if part and f".{name}".endswith(f".{part}")), wanted)
        if name not in layers or wanted is None:
            raise MismatchError(f"{folder} holds rows of tokens that the model does not have: {name}")
        if name == name_of_head(model):
            refuse_tied(model, name)
        weight = cast("nn.Parameter", model.get_submodule(name).weight)
        if max(wanted) >= len(weight):
            raise MismatchError(
                f"{folder} has a row for token {max(wanted):,}, and {name} of the model has {len(weight):,} rows",
                hint="name a base with as many: resize_token_embeddings of transformers, then --base-model FOLDER",
            )
        if tensor.shape != (len(wanted), weight.shape[1]):
            raise MismatchError(f"{folder} is for another model: {name} has rows of {tuple(tensor.shape)}")
        weight[list(wanted)] = tensor.to(weight)
    if ids and not tensors:
        raise MismatchError(f"{folder} lacks the rows of tokens that its configuration names")


def _check_shape(parameter: nn.Parameter, tensor: torch.Tensor, name: str, folder: Path) -> None:
    if parameter.shape != tensor.shape:
        raise MismatchError(
            f"{folder} is for another model: {name} is {tuple(tensor.shape)}, and this one needs {tuple(parameter.shape)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
