"""Which tensor of a model folder is which of the model that was loaded from it, and which of them it has no place for.

transformers renames tensors while it loads (experts that are fused, prefixes of models inside of models) and takes no
notice of those that a class lists as not its own, such as a vision tower or a head for several tokens.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.errors import MismatchError
from sftcli.modeling.architecture import beside_text
from sftcli.modeling.formats.stored_tensors import FLOATS, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a name: a part of the model, or one of its layers.
_START = re.compile(r"(?:model\.)?(?:(?:language|text)_model\.)?(?:model\.)?(?:\w+\.(?=\d))?\w+")
# What older releases wrote and newer ones compute by themselves.
_COMPUTED = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|position_ids|masked_bias)")
_ADAPTED = re.compile(r"\.(?:token_adapter\.)?base_layer\.")  # where peft keeps what it sits on
_MASK_AXES = 4  # of a causal mask, which some wrote under the name of a bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The tensor of a model that a tensor in a file becomes; ``pattern`` is what a converter knows its name by, if one does."""

    name: str
    pattern: str | None

    @property
    def is_converted(self) -> bool:
        """Whether it is a part of that tensor, or turned."""
        return self.pattern is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensors:
    """The tensors of a model folder; ``places`` are those that the model has, ``beside`` the others.

    With ``is_plain`` there are none beside it, and it holds the others as they are, under their names.
    """

    stored: Mapping[str, StoredTensor]
    places: Mapping[str, Place]
    beside: Mapping[str, StoredTensor]
    is_plain: bool

    @staticmethod
    def of(model: "PreTrainedModel", folder: Path) -> "SourceTensors":
        """Return those of ``folder``, which ``model`` was loaded from; it may hold an adapter as well."""
        stored, place = stored_tensors(folder), place_finder(model)
        places = {name: found for name in stored if (found := place(name)) is not None}
        beside = {
            name: tensor
            for name, tensor in stored.items()
            if name not in places and not _is_computed(name, tensor)
        }
        if getattr(model, "hf_quantizer", None) is not None:
            beside = {}  # numbers that belong to packed weights, such as their scales
        is_plain = not beside and not conversions_of(model)
        return SourceTensors(stored=stored, places=places, beside=beside, is_plain=is_plain)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the floating-point type of each tensor of the model in the files; of several parts that of the first."""
        found: dict[str, torch.dtype] = {}
        for name, place in self.places.items():
            if (dtype := FLOATS.get(self.stored[name].dtype)) is not None:
                found.setdefault(place.name, dtype)
        return found

    def without_text(self, model: "PreTrainedModel") -> dict[str, StoredTensor]:
        """Return the tensors that ``model`` has no place for, and those of it that no text reaches, by name."""
        names = beside_text(model)
        inside = {name: self.stored[name] for name, place in self.places.items() if place.name in names}
        return inside | dict(self.beside)

    def in_words(self, names: Collection[str]) -> str:
        """Return how many tensors have which beginnings of ``names``, and what part of all numbers they hold."""
        starts = Counter(found[0] for name in names if (found := _START.match(name)))
        listed = ", ".join(f"{count} {start}.*" for start, count in sorted(starts.items()))
        sizes = {name: prod(tensor.shape) for name, tensor in self.stored.items()}
        share = sum(sizes[name] for name in names) / max(1, sum(sizes.values()))
        return f"{len(names)} tensors ({listed}), {share:.1%} of all weights"


def place_finder(model: "PreTrainedModel") -> Callable[[str], Place | None]:
    """Return what gives the place in ``model`` of a tensor with a name as in a file, as transformers finds it."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = conversions_of(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    state = {_ADAPTED.sub(".", name): tensor for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix

    def place(name: str) -> Place | None:
        found, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if found not in state and name in state:  # it has the model's own name already
            found, pattern = rename_source_key(name, [], [], prefix, state)
        return Place(name=found, pattern=pattern) if found in state else None

    return place


def conversions_of(model: "PreTrainedModel") -> list[object]:
    """Return how transformers renamed and fused tensors when it loaded ``model``."""
    return [*(getattr(model, "_weight_conversions", None) or ())]


def check_names_come_back(model: "PreTrainedModel", folder: Path, source: SourceTensors) -> None:
    """Make sure that saving ``model`` gives its tensors the names that they have in ``folder``, which other parts rely on.

    Raises:
        MismatchError: It would not.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    written = revert_weight_conversion(model, shapes)
    if lost := sorted(source.places.keys() - written.keys()):
        raise MismatchError(
            f"{folder} holds more than a language model, {source.in_words(source.without_text(model))}, and its trained "
            f"weights could not be saved under their original names: {lost[0]} would be renamed",
            hint="name a folder that holds the language model alone, or train an adapter: --lora",
        )


def _is_computed(name: str, tensor: StoredTensor) -> bool:
    is_mask = name.endswith(".bias") and len(tensor.shape) == _MASK_AXES
    return is_mask or _COMPUTED.fullmatch(name) is not None
