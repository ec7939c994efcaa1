"""Weights that transformers puts together from several tensors in files, or turns: experts of a layer, products in one."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sftcli.modeling.formats.source_tensors import SourceTensors, conversions_of
from sftcli.modeling.formats.stored_tensors import StoredTensor, view_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How tensors in files become weights of ``model``, the first of which is called ``name``, in ``dtype``."""

    model: "PreTrainedModel"
    converter: "WeightConverter"
    name: str
    dtype: torch.dtype
    parts: Sequence[
        tuple[str, str, StoredTensor]
    ]  # each with the pattern that its name matches, and that name

    def made(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return the weights by name; on the meta device nothing is read."""
        converter = deepcopy(self.converter)
        for pattern, name, stored in self.parts:
            is_read = device != "meta"
            part = view_of(stored).to(self.dtype) if is_read else torch.empty(stored.shape, device=device)
            converter.add_tensor(self.name, name, pattern, part)  # type: ignore[arg-type]  # as for saving
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def recipes(model: "PreTrainedModel", source: SourceTensors) -> Mapping[str, Recipe]:
    """Return how each converted weight of ``model`` is made, by its name."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = {
        pattern: one
        for one in conversions_of(model)
        if isinstance(one, WeightConverter)
        for pattern in one.source_patterns
    }
    parts: dict[str, list[tuple[str, str, StoredTensor]]] = {}
    for name in sorted(source.places, key=dot_natural_key):
        place = source.places[name]
        if place.pattern is not None:
            parts.setdefault(place.name, []).append((place.pattern, name, source.stored[name]))
    found: dict[str, Recipe] = {}
    for name, named in parts.items():
        recipe = Recipe(
            model=model,
            converter=converters[named[0][0]],
            name=name,
            dtype=model.get_parameter_or_buffer(name).dtype,
            parts=named,
        )
        found |= dict.fromkeys(recipe.made("meta"), recipe)
    return found
