"""Values of a model's configuration that are the same for all layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def config_value(model: "PreTrainedModel", name: str) -> Any:  # noqa: ANN401 - whatever stands there
    """Return ``name`` from the configuration of the text model; None if absent, or if layers differ in it.

    A configuration whose layers have values of their own raises an error that is no AttributeError when one is asked for.
    """
    try:
        return getattr(model.config.get_text_config(), name, None)
    except Exception:  # noqa: BLE001 - a configuration may run any code to answer
        return None
