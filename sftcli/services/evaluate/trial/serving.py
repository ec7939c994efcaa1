"""A server in the place of the model that is tried. Needs no torch."""

from sftcli.config.auto import with_values
from sftcli.config.schema.settings import Settings
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.services.server.address import ServerAddress, names_server, parse_server


def without_server(settings: Settings) -> tuple[Settings, ServerAddress | None]:
    """Return settings by which rows can be prepared, and the server that ``model.name`` names, if it names one.

    Rows are read, split and measured by a tokenizer: that of the model in ``model.tokenizer``, by default the default model's.

    Raises:
        UsageError: The server is written wrongly.
    """
    model = settings.model
    if not names_server(model.name):
        return settings, None
    here = {"model.name": model.tokenizer or ALIAS, "model.tokenizer": None}
    return with_values(settings, here), parse_server(model.name)
