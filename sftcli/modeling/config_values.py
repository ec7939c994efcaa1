"""Values of a model's configuration that are the same for all layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
SPARE_ROWS = 2  # by which a table of positions may be longer than what it says, as that of OPT is


def config_value(model: "PreTrainedModel", name: str) -> Any:  # noqa: ANN401 - whatever stands there
    """Return ``name`` from the configuration of the text model; None if absent, or if layers differ in it.

    A configuration whose layers have values of their own raises an error that is no AttributeError when one is asked for.
    """
    try:
        return getattr(model.config.get_text_config(), name, None)
    except Exception:  # noqa: BLE001 - a configuration may run any code to answer
        return None


def learned_positions(model: "PreTrainedModel") -> int:
    """Return how many positions ``model`` has learned; 0 where it computes them."""
    positions = next((value for name in POSITIONS if (value := config_value(model, name))), 0)
    tokens = model.get_input_embeddings()
    sizes = [getattr(module, "num_embeddings", -1) for module in model.modules() if module is not tokens]
    return positions if any(positions <= size <= positions + SPARE_ROWS for size in sizes) else 0
