"""Values of a model's configuration that are the same for all layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftcli.json_files import read_json

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


def stated_values(folder: Path) -> Mapping[str, object]:
    """Return what a model folder says of its text model; nothing where it has no configuration."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    text = config.get("text_config")
    return config | (text if isinstance(text, dict) else {})


def stated_positions(values: Mapping[str, object]) -> int:
    """Return the positions that a configuration names; 0 where it names none."""
    return next((value for name in POSITIONS if isinstance(value := values.get(name), int)), 0)


def positions_of(folder: Path) -> int:
    """Return how many positions the model in ``folder`` was made for; 0 where it does not say."""
    return reach_of(stated_values(folder))


def positions_of_model(model: "PreTrainedModel") -> int:
    """Return how many positions ``model`` was made for; 0 where it does not say, as one that keeps a state."""
    return reach_of(model.config.get_text_config().to_dict())


def reach_of(values: Mapping[str, object]) -> int:
    """Return how far the positions of a configuration reach, also those that are turned slower than at first; 0 without a limit.

    A window over them is no limit. Where layers differ in that, the positions it names are how far they reach.
    """
    positions = stated_positions(values)
    for key in ("rope_parameters", "rope_scaling") if positions else ():
        scaling = values.get(key)
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        if isinstance(scaling, dict) and isinstance(factor, int | float):
            first = scaling.get("original_max_position_embeddings") or values.get(
                "original_max_position_embeddings"
            )
            return max(positions, round(factor * (first if isinstance(first, int) else positions)))
    return positions
