"""How far each layer of a model looks back: at everything, or at the newest positions."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TYPES = {DynamicLayer: "full_attention", DynamicSlidingWindowLayer: "sliding_attention"}
"""What configurations call the layers that caches keep so."""
_KEY = "sliding_window"
# Numbers of a config beyond which a layer does not see everything.
_SIGHT = re.compile(r"(window|chunk|block)(_size|_len)?$|^index_topk")


def windows_of(model: "PreTrainedModel") -> Sequence[int] | None:
    """Return how many positions each layer sees, 0 for all; None where a layer keeps or sees something else.

    Windows that the cache does not know of are something else, as the mask of a step shows everything.
    """
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    windows = [getattr(layer, _KEY, 0) if type(layer) in TYPES else -1 for layer in layers]
    limits = [key for key in _limits_of_sight(config) if not (key == _KEY and all(windows))]
    if limits or not windows or min(windows) < 0 or len({*windows} - {0}) > 1:
        return None
    return windows


def has_types(model: "PreTrainedModel") -> bool:
    """Return whether the model takes a mask for each type of layer, not one for all."""
    return getattr(model.config.get_text_config(decoder=True), "layer_types", None) is not None


@contextmanager
def narrow_windows(model: "PreTrainedModel", positions: int) -> Iterator[None]:
    """Let windows of ``model`` be so narrow meanwhile that short texts are longer."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, _KEY, None)
    if not isinstance(window, int) or window <= positions:
        yield
        return
    setattr(config, _KEY, positions)
    try:
        yield
    finally:
        setattr(config, _KEY, window)


def _limits_of_sight(config: "PretrainedConfig") -> list[str]:
    """Return the keys that let layers see less than they keep; where each layer has a type, the cache knows its window."""
    found = [
        key
        for key, value in vars(config).items()
        if _SIGHT.search(key) and isinstance(value, int) and value > 0
    ]
    typed = getattr(config, "layer_types", None) is not None
    return [key for key in found if not typed or key.startswith("index")]
