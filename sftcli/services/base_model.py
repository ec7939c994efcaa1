"""The model that a run starts from. Apart from ``models``, because preparing rows needs its folder and no torch."""

from sftcli.config.schema import ModelSettings
from sftcli.events import EventSink
from sftcli.modeling.locate import LocatedModel, locate_model


def locate_base(settings: ModelSettings, emit: EventSink) -> LocatedModel:
    """Return the folder of the model that a run of these settings starts from."""
    return locate_model(
        settings.name,
        revision=settings.revision,
        tokenizer=settings.tokenizer,
        emit=emit,
        with_code=settings.trust_remote_code,
    )
