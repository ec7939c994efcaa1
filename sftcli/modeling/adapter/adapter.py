"""Adapters inside a model in memory: add new ones, load them from a folder, merge them. The only module that imports peft.

The layers of peft are put into the model in place: it keeps its class, its head and its names, and everything that
works on the model works on it with an adapter.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.config.schema.run import Attention
from sftcli.errors import DataError, MismatchError, UsageError
from sftcli.foreign import foreign_file
from sftcli.modeling.adapter.folder import (
    PREFIX,
    AdapterBase,
    LoraForm,
    check_adapter_weights,
    means,
    read_base,
    read_form,
)
from sftcli.modeling.adapter.targets import (
    ADAPTER_NAME,
    ROWS,
    LeftAlone,
    Targets,
    choose_targets,
    file_name,
    is_transposed,
    left_alone,
    linear_layers,
    name_of_embedding,
    name_of_head,
    named_by,
    refuse_tied,
    shared_layers,
    short_names,
    token_rows,
    wrapper_names,
)
from sftcli.modeling.architecture import opens_whole
from sftcli.modeling.formats.identity import numbers_hash
from sftcli.modeling.load import load_model

_MATRIX = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_embedding_A)")
_SHOWN = 3
_HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedAdapter:
    """A new adapter: the configuration that peft needs to read its weights, without the base's name, and what has none."""

    config: dict[str, object]
    left_alone: LeftAlone


def add_adapter(
    model: PreTrainedModel, settings: AdapterSettings, *, new_ids: Collection[int] = ()
) -> AddedAdapter:
    """Put a new adapter into ``model``, the only part of it that trains from then on; it adds nothing yet.

    The rows of the tokens ``new_ids`` belong to it, in token embeddings and head.

    Raises:
        UsageError: ``settings`` name what the model does not have, or what cannot have an adapter; or peft cannot have rows of tokens.
    """
    dora = settings.kind is AdapterKind.DORA
    renamed = _renamed_by_peft(model)
    no_dora = dict.fromkeys(renamed, "peft takes it as a parameter in this family, which DoRA cannot adapt")
    targets = choose_targets(
        model, settings.target_modules, experts=settings.experts, refused=no_dora if dora else None
    )
    alone = left_alone(model, targets)
    config = _configuration(model, settings, targets, renamed)
    rows = token_rows(model, new_ids, targets.layers)
    names = _Ranks(
        layers=dict.fromkeys(targets.layers, settings.rank),
        parameters=dict.fromkeys(targets.parameters, settings.rank),
    )
    form = LoraForm(
        alpha=settings.alpha,
        rslora=settings.rslora,
        dora=dora,
        fan_in_fan_out=bool(config["fan_in_fan_out"]),
        bias=False,
    )
    _inject(model, names, form, dropout=settings.dropout)
    if rows:
        _give_rows(model, rows)
        config["trainable_token_indices"] = rows
    return AddedAdapter(config=config, left_alone=alone)


def _configuration(
    model: PreTrainedModel, settings: AdapterSettings, targets: Targets, renamed: set[str]
) -> dict[str, object]:
    """Return how peft is told of ``targets``; ``model`` has no adapter yet."""
    import peft

    modules = [name for name, _ in model.named_modules() if name]
    weights = [name for name, _ in model.named_parameters()]
    as_parameters = [f"{layer}.weight" for layer in targets.layers if layer in renamed]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": short_names((layer for layer in targets.layers if layer not in renamed), modules),
        "use_rslora": settings.rslora,
        "use_dora": settings.kind is AdapterKind.DORA,
        "bias": "none",
        "fan_in_fan_out": is_transposed(model, targets.layers),
        "inference_mode": True,
        "peft_version": peft.__version__,
    }
    parameters = [*as_parameters, *targets.parameters]
    named = {"target_parameters": short_names(parameters, weights)} if parameters else {}
    return config | named | _opened_as(model)


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


def set_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Set the numbers of the new adapter in ``model`` to those of the adapter in ``folder``, in float32.

    Raises:
        ConsentError, NotFoundError, DataError: As in ``load_adapter``.
        MismatchError: They are of different shapes or on different layers.
    """
    _fill(model, read_tensors(folder), folder)


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
    tensors = read_tensors(folder)
    rows = {name.removesuffix(ROWS): tensors.pop(name) for name in sorted(tensors) if name.endswith(ROWS)}
    _replace_rows(model, rows, form.token_ids, folder)
    plain = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    _replace_plain(model, plain, folder)
    ranks = _ranks(model, tensors, form, folder)
    if missing := sorted(ranks.layers.keys() - dict(model.named_modules()).keys()):
        raise MismatchError(f"{folder} is for another model: this one has no layer {_some(missing)}")
    _refuse_shared(model, ranks)
    if ranks.layers or ranks.parameters:
        with foreign_file(folder, "cannot be put into the model"):
            _inject(model, ranks, form)
    _fill(model, {name: tensors[name] for name in tensors.keys() - plain.keys()}, folder)
    model.requires_grad_(False)
    model.train(False)


def merge_adapter(
    folder: Path,
    *,
    base: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    attention: Attention = Attention.AUTO,
    trusts_code: bool = False,
) -> PreTrainedModel:
    """Return the model in ``base`` with the adapter in ``folder`` merged into its weights: an ordinary full model.

    Args:
        folder: An adapter's folder.
        base: The model folder that it belongs to; see ``services.models.ModelChoice.weights_folder``.
        dtype: Of the model returned. Sums are made in float32, layer by layer, and rounded once.
        device: Where to; None is the CPU.
        attention: As in ``load_model``.
        trusts_code: As in ``load_model``, of ``base``.

    Raises:
        MismatchError: ``base`` is another model than the one the adapter was trained on.
        ConsentError, NotFoundError, DataError, UsageError: As in ``load_adapter`` and ``load_model``.
    """
    check_base(folder, base)
    model = load_model(
        base,
        dtype=dtype,
        device=device or torch.device("cpu"),
        attention=attention,
        trusts_code=trusts_code,
    )
    load_adapter(model, folder)
    merge_in_place(model)
    return model


def merge_in_place(model: PreTrainedModel) -> None:
    """Work an adapter into the weights of ``model`` and take its layers out.

    Raises:
        DataError: The sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    for name, layer in reversed(layers.items()):  # of experts, the innermost one first
        changed = getattr(layer, "parameter_name", "weight")
        weight = cast("nn.Parameter", getattr(layer.get_base_layer(), changed))
        dtype = weight.dtype
        cast("nn.Module", layer).float()
        layer.merge()
        if not torch.isfinite(weight).all():
            raise DataError(f"merging gives non-finite values in {name}", hint="train it again")
        below = cast("nn.Module", layer.base_layer).to(dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, below)


def _opened_as(model: PreTrainedModel) -> dict[str, object]:
    """Return what tells peft the class of a model of text and images, which is not that of its kind of task."""
    if not opens_whole(model):
        return {}
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"task_type": None, "auto_mapping": mapping}


class _Held(nn.Module):
    """A model as peft sees it: without its type, by which peft gives layers of some families other names than they have."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.add_module(_HELD, model)
        self.is_loaded_in_8bit = getattr(model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(model, "is_loaded_in_4bit", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """What gets an adapter, by full names, with its rank."""

    layers: Mapping[str, int]
    parameters: Mapping[str, int]


def _inject(model: PreTrainedModel, ranks: _Ranks, form: LoraForm, *, dropout: float = 0.0) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    every = {f"{_HELD}.{name}": rank for name, rank in {**ranks.layers, **ranks.parameters}.items()}
    first = next(iter(every.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=first,
        rank_pattern={re.escape(name): rank for name, rank in every.items() if rank != first},
        lora_alpha=cast("int", form.alpha),
        lora_dropout=dropout,
        use_rslora=form.rslora,
        use_dora=form.dora,
        fan_in_fan_out=form.fan_in_fan_out,
        lora_bias=form.bias,
        target_modules=[f"{_HELD}.{name}" for name in ranks.layers],
        target_parameters=[f"{_HELD}.{name}" for name in ranks.parameters] or None,
    )
    with warnings.catch_warnings():
        # It looks for them among the layers alone.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        inject_adapter_in_model(config, _Held(model), adapter_name=ADAPTER_NAME)


def _give_rows(model: PreTrainedModel, rows: Mapping[str, Sequence[int]]) -> None:
    """Let ``rows`` of tokens, by layer, train beside the adapter."""
    from peft import LoraConfig
    from peft.utils.other import set_additional_trainable_modules

    config = LoraConfig(trainable_token_indices={name: list(ids) for name, ids in rows.items()})
    set_additional_trainable_modules(
        model=model,
        peft_config=config,
        model_config=model.config.get_text_config().to_dict(),
        adapter_name=ADAPTER_NAME,
    )


def _ranks(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], form: LoraForm, folder: Path
) -> _Ranks:
    """Return what the ``tensors`` of ``folder`` are for: layers by their names, and parameters that its configuration names.

    Raises:
        MismatchError: A parameter that it names is not in the model, or its tensors are not there.
    """
    rows = {
        found["layer"]: int(tensor.shape[0])
        for name, tensor in tensors.items()
        if (found := _MATRIX.fullmatch(name)) and tensor.ndim == 2
    }
    weights, layers = dict(model.named_parameters()), linear_layers(model)
    named = set(named_by(form.parameters, weights))
    if unknown := [item for item in form.parameters if not named_by([item], weights)]:
        raise MismatchError(f"{folder} is for another model: this one has no parameter {_some(unknown)}")
    of_layers = {f"{layer}.weight": layer for layer in layers}
    wrapped = wrapper_names(name for name in weights if name in named and name not in of_layers)
    needed = [*wrapped, *(of_layers[name] for name in named if name in of_layers)]
    if missing := [name for name in needed if name not in rows]:
        raise MismatchError(f"{folder} lacks tensors that its configuration requires: {_some(missing)}")
    return _Ranks(
        layers={layer: rank for layer, rank in rows.items() if layer not in wrapped},
        parameters={name: rows[wrapper] // _matrices(weights[name]) for wrapper, name in wrapped.items()},
    )


def _matrices(weight: nn.Parameter) -> int:
    return len(weight) if weight.ndim == 3 else 1


def _refuse_shared(model: PreTrainedModel, ranks: _Ranks) -> None:
    """Raise where something that has an adapter is the weights of two layers."""
    shared, ends = shared_layers(model), (name_of_head(model), name_of_embedding(model))
    for layer in (*ranks.layers, *(name.rpartition(".")[0] for name in ranks.parameters)):
        if layer in ends:
            refuse_tied(model, layer)
        if layer in shared:
            raise UsageError(
                f"{layer} shares its weights with {shared[layer]}, so an adapter on it cannot be merged: that would "
                "change both",
                hint="train a new adapter that leaves it out; auto does",
            )


def _renamed_by_peft(model: PreTrainedModel) -> set[str]:
    """Return the linear layers that peft, told to put an adapter on them, would look for under another name.

    In families whose experts it knew as layers it takes the names of these for those of experts, wherever they stand.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_renamed(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it wants others beside it
            return True
        return set(config.target_modules or ()) != {name}

    layers = linear_layers(model)
    renamed = {last for last in {name.rpartition(".")[2] for name in layers} if is_renamed(last)}
    return {name for name in layers if name.rpartition(".")[2] in renamed}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by their names in the model that peft put it into."""
    path = check_adapter_weights(folder)
    with foreign_file(path):
        tensors = load_file(path)
    if strange := sorted(name for name in tensors if not name.startswith(PREFIX)):
        raise DataError(f"{folder} holds {strange[0]!r}, which is not an adapter tensor")
    if spoilt := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise DataError(
            f"{path} holds non-finite values: {_some(spoilt)}",
            hint="use an earlier checkpoint, or train it again",
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


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
    ends = {f"{layer}.weight" for layer in (name_of_head(model), name_of_embedding(model))}
    for name, tensor in tensors.items():
        if name not in places:
            raise MismatchError(f"{folder} holds tensors that the model does not have: {name}")
        if name in ends:
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
    embedding, head = name_of_embedding(model), name_of_head(model)
    for name, tensor in tensors.items():
        wanted = ids.get("") if name == embedding else None
        wanted = next((ids[part] for part in ids if part and means(part, name)), wanted)
        if name not in (embedding, head) or wanted is None:
            raise MismatchError(f"{folder} holds rows of tokens that the model does not have: {name}")
        if name == head:
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
