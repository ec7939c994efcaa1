"""Which weights of a model an adapter sits on, which it cannot sit on and why, and how they are named in files."""

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcli.config.schema.adapter import AUTO_TARGETS
from sftcli.errors import UsageError
from sftcli.memory_faults import Attempt
from sftcli.modeling.adapter.folder import PREFIX, means
from sftcli.modeling.architecture import beside_text
from sftcli.modeling.config_values import config_value
from sftcli.suggest import did_you_mean

ADAPTER_NAME = "default"  # what peft calls the one adapter of a model; it is not part of the names in files
EXPERTS, ROUTERS = "experts", "routers"
# Packages whose linear layers compute x W' + b, whatever their weights look like in memory.
_PLAIN_FORWARD = ("torch.", "bitsandbytes.", "transformers.integrations.", "transformers.pytorch_utils")
_ROUNDING = 0.02  # of a product in bfloat16
# What code may ask a weight without computing with it.
_ASKED = "dtype|device|shape|ndim|size|numel|requires_grad|is_cuda"
ROWS = ".token_adapter.trainable_tokens_delta"  # ends the name of rows of tokens, in files and in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What gets an adapter, by full names: linear layers, and parameters with the weights of all experts of a block."""

    layers: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    @property
    def weights(self) -> set[str]:
        """Names of the weights that change with it."""
        return {f"{layer}.weight" for layer in self.layers} | set(self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAlone:
    """Weights of layers without an adapter, as shares of those of all layers; embeddings and the head are not counted."""

    kinds: Mapping[str, float] = field(
        default_factory=dict
    )  # EXPERTS, ROUTERS, else names; the largest first

    @property
    def share(self) -> float:
        """Their share in all."""
        return sum(self.kinds.values())


def choose_targets(
    model: PreTrainedModel,
    wanted: Iterable[str],
    *,
    experts: bool = False,
    refused: Mapping[str, str] | None = None,
) -> Targets:
    """Return what the names in ``wanted`` mean, and with ``experts`` all experts that are stored together.

    Args:
        model: Without an adapter.
        wanted: ``auto``, or last parts of names of linear layers. ``auto`` leaves out what cannot have an adapter.
        experts: Whether experts get one.
        refused: More layers that cannot have one, with the reason, by full names.

    Raises:
        UsageError: There is no such layer, or it cannot have an adapter, or there are no experts.
    """
    layers, head = linear_layers(model), name_of_head(model)
    reasons = {**_reasons(model), **(refused or {})}
    found: set[str] = set()
    for item in wanted:
        if item == AUTO_TARGETS:
            found |= {name for name in layers if name != head and name not in reasons}
            continue
        meant = {name for name in (*layers, *reasons) if means(item, name)}
        for name in sorted(meant & reasons.keys()):
            raise UsageError(
                f"adapter.target_modules names {item!r}, and {name} cannot have an adapter: {reasons[name]}",
                hint="leave it out, or name the others by more parts of their names, such as self_attn.out_proj; auto "
                "leaves out what cannot have one",
            )
        if not meant:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(
                f"adapter.target_modules names {item!r}, and {type(model).__name__} has no such linear layer",
                hint=did_you_mean(item, known) or f"it has {', '.join(known)}",
            )
        found |= meant
    if not found and not experts:
        raise UsageError(
            f"{type(model).__name__} has no linear layer that can have an adapter",
            hint="train the whole model: leave out --lora",
        )
    if head in found:
        refuse_tied(model, head)
    parameters = tuple(expert_parameters(model)) if experts else ()
    if experts and not parameters:
        raise UsageError(
            f"adapter.experts is set, and {type(model).__name__} has no experts that are stored together",
            hint="leave it out",
        )
    return Targets(layers=tuple(sorted(found)), parameters=parameters)


def expert_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that hold a matrix of each of several experts."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if _holds_experts(name, module)
        for own, weight in module.named_parameters(recurse=False)
        if _is_of_experts(weight) and f"{name}.{own}" not in beside_text(model)
    ]


def short_names(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest endings that mean ``names`` and none of ``others``, as peft reads them."""
    chosen = set(names)
    taken = {ending for other in others if other not in chosen for ending in _endings(other)}
    return sorted({next(ending for ending in _endings(name) if ending not in taken) for name in chosen})


def left_alone(model: PreTrainedModel, targets: Targets) -> LeftAlone:
    """Return what ``targets`` leave without an adapter; ``model`` has none yet."""
    beside = [model.get_input_embeddings(), model.get_output_embeddings()]
    beside += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {id(weight) for module in beside if module is not None for weight in module.parameters()}
    kinds = _kinds(model)
    sizes: Counter[str] = Counter()
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or id(weight) in others or name in beside_text(model):
            continue
        total += weight.numel()
        if name not in targets.weights:
            short = ".".join(name.removesuffix(".weight").split(".")[-2:])
            sizes[kinds.get(name, short)] += weight.numel()
    return LeftAlone(kinds={kind: size / total for kind, size in sizes.most_common()})


def token_rows(model: PreTrainedModel, ids: Collection[int], targets: Sequence[str]) -> dict[str, list[int]]:
    """Return the layers in which the rows of the tokens ``ids`` train, as peft names them; a tied head follows the embeddings.

    ``targets`` are the layers that have matrices of their own.

    Raises:
        UsageError: peft would compute something else than the model with these rows.
    """
    if not ids:
        return {}
    head = model.get_output_embeddings()
    is_tied, head_name = _is_tied(model), name_of_head(model)
    if any(means(item, head_name) for item in targets):
        raise _no_rows(
            model, "adapter.target_modules names the output head, whose rows of tokens train by themselves"
        )
    if getattr(head, "bias", None) is not None:
        raise _no_rows(model, "the output head has a bias, which peft leaves out beside rows of tokens")
    if bool(config_value(model, "tie_word_embeddings")) != is_tied:
        raise _no_rows(
            model, "its configuration ties the output head to the embeddings, and its weights do not"
        )
    layers = [name_of_embedding(model)] + ([] if is_tied or head is None else [head_name])
    return {layer: sorted(ids) for layer in layers}


def _no_rows(model: PreTrainedModel, why: str) -> UsageError:
    return UsageError(
        f"model.new_tokens cannot be trained with an adapter of {type(model).__name__}: {why}",
        hint="train the whole model, or leave model.new_tokens out",
    )


def file_name(parameter: str) -> str:
    """Return the name that peft gives a parameter of an adapter in a file."""
    name = parameter.removesuffix(".weight") if ".lora_magnitude_vector." in parameter else parameter
    if name.endswith(f".{ADAPTER_NAME}"):
        return PREFIX + name.removesuffix(f".{ADAPTER_NAME}")
    stem, _, last = name.rpartition(".")
    return f"{PREFIX}{stem.removesuffix(f'.{ADAPTER_NAME}')}.{last}"


def wrapper_names(parameters: Iterable[str]) -> dict[str, str]:
    """Return under which layer's name the adapters of ``parameters`` are, in the model and in files.

    ``parameters`` are in the order of the model. Of those of one module, each is wrapped around the ones before it.
    """
    own: dict[str, list[str]] = {}
    for name in parameters:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        module + ".base_layer" * depth: name
        for module, names in own.items()
        for depth, name in enumerate(reversed(names))
    }


def named_by(items: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that ``items`` mean, as peft reads them."""
    return [name for name in names if any(means(item, name) for item in items)]


def is_transposed(model: nn.Module, layers: Collection[str]) -> bool:
    """Return whether one of ``layers`` keeps its weights with the inputs first."""
    return any(isinstance(model.get_submodule(layer), Conv1D) for layer in layers)


def name_of_head(model: PreTrainedModel) -> str:
    """Return the name of the layer that makes scores of tokens; "" where there is none."""
    return _name_of(model, model.get_output_embeddings())


def name_of_embedding(model: PreTrainedModel) -> str:
    """Return the name of the layer that makes vectors of tokens."""
    return _name_of(model, model.get_input_embeddings())


def refuse_tied(model: PreTrainedModel, name: str) -> None:
    """Raise where head and token embeddings of ``model`` are the same weights.

    Raises:
        UsageError: They are; ``name`` is what the adapter would sit on.
    """
    if _is_tied(model):
        raise UsageError(
            f"{name} shares its weights with the token embeddings, so an adapter on it cannot be merged: that would "
            "change both",
            hint="leave it out of adapter.target_modules; auto does",
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that are a product with their weights, by name; none that no text reaches."""
    beside = beside_text(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if f"{name}.weight" not in beside and _is_plain(layer)
    }


def _is_plain(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a product with its weights, and nothing that its class makes of it."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    return f"{type(layer).forward.__module__}.".startswith(_PLAIN_FORWARD) or _multiplies(layer)


@torch.no_grad()
def _multiplies(layer: nn.Linear | Conv1D) -> bool:
    """Return whether ``layer`` gives the product of some numbers and its weights, by trying."""
    if not isinstance(layer, nn.Linear):
        return False
    given = torch.linspace(-1, 1, 2 * layer.in_features).view(1, 2, -1).to(layer.weight)
    found: Any = None
    with Attempt():
        found = layer(given)
    expected = functional.linear(given, layer.weight, layer.bias)
    is_one = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return is_one and bool((found - expected).norm() <= _ROUNDING * expected.norm())


def _reasons(model: PreTrainedModel) -> dict[str, str]:
    """Return why linear layers of ``model`` cannot have an adapter, by their names."""
    modules, routers, shared = dict(model.named_modules()), _routers(model), shared_layers(model)
    read: dict[type, frozenset[str]] = {}
    reasons: dict[str, str] = {}
    for name, layer in modules.items():
        if not isinstance(layer, nn.Linear | Conv1D) or f"{name}.weight" in beside_text(model):
            continue
        above, last = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
        if type(above) not in read:
            read[type(above)] = _read_directly(type(above))
        if name in routers:
            reasons[name] = "it chooses experts"
        elif not _is_plain(layer):
            reasons[name] = f"a {type(layer).__name__} does more than multiply by its weights"
        elif last in read[type(above)] and _splits(above) != 1:
            reasons[name] = f"{type(above).__name__} computes with its weights directly"
        elif name in shared:
            reasons[name] = f"it shares its weights with {shared[name]}, so merging would change both"
    return reasons


def _is_tied(model: PreTrainedModel) -> bool:
    """Return whether output head and token embeddings are the same weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)


def shared_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return the layers whose weights are those of another, which they are mapped to; but for the head (``refuse_tied``)."""
    ends = {name_of_head(model), name_of_embedding(model)}
    holders: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if name not in ends and isinstance(weight := getattr(layer, "weight", None), nn.Parameter):
            holders.setdefault(id(weight), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(names) > 1
        for name in names
    }


def _routers(model: nn.Module) -> set[str]:
    """Return the layers that choose experts: those in a block with experts that make a number for each of them."""
    found: set[str] = set()
    for name, count in _expert_counts(model).items():
        block = name.rpartition(".")[0]
        found |= {
            f"{block}.{own}"
            for own, layer in model.get_submodule(block).named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == count
        }
    return found


def _expert_counts(model: nn.Module) -> dict[str, int]:
    """Return how many experts are kept in modules of ``model``, by their names."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        counts = [len(weight) for weight in module.parameters(recurse=False) if _is_of_experts(weight)]
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == EXPERTS:
            found[name] = len(module)
        elif counts and _holds_experts(name, module):
            found[name] = counts[0]
    return found


def _holds_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()


def _is_of_experts(weight: nn.Parameter) -> bool:
    return weight.ndim == 3 and len(weight) > 1 and weight.is_floating_point()


def _kinds(model: PreTrainedModel) -> dict[str, str]:
    """Return what weights are, by their names, where a person knows that better than the names."""
    kinds: dict[str, str] = {}
    for experts, count in _expert_counts(model).items():
        block = experts.rpartition(".")[0]
        for own, weight in model.get_submodule(block).named_parameters():
            name = f"{block}.{own}"
            if name.startswith(f"{experts}."):
                kinds[name] = EXPERTS
            elif weight.ndim == 2 and len(weight) == count:
                kinds[name] = ROUTERS
    return kinds


def _read_directly(kind: type[nn.Module]) -> frozenset[str]:
    """Return the layers of modules of ``kind`` whose weights its code multiplies with itself, past an adapter on them."""
    found: set[str] = set()
    for part in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            text = inspect.getsource(part)
        except (OSError, TypeError):  # a class without a file
            continue
        found |= set(re.findall(rf"\bself\.(\w+)\.weight\b(?!\.(?:{_ASKED})\b)", text))
    return frozenset(found)


def _splits(module: nn.Module) -> object:
    """Return into how many parts ``module`` cuts weights to add up products as a model on several devices does."""
    return getattr(module, "pretraining_tp", None)  # BLOOM, which with 1 part has layers multiply


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _name_of(model: PreTrainedModel, wanted: object) -> str:
    return next((name for name, layer in model.named_modules() if layer is wanted), "")
