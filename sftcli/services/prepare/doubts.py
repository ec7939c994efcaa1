"""What the number of rows that were prepared leaves in doubt, with the flag that changes it."""

import math
from collections.abc import Iterator

from sftcli.config.schema.settings import Settings
from sftcli.figures import FEW_ROWS, are_few, counted


def heldout_doubts(settings: Settings, *, train_rows: int, heldout_rows: int) -> Iterator[str]:
    """Yield that the held-out rows prove little, where they are few."""
    if not are_few(heldout_rows):
        return
    more = more_heldout(settings, FEW_ROWS, of=train_rows + heldout_rows)
    yield f"{counted(heldout_rows, 'held-out row')} prove{'s' if heldout_rows == 1 else ''} little; {more}"


def more_heldout(settings: Settings, wanted: int, *, of: int) -> str:
    """Return what holds out ``wanted`` rows of ``of``, those trained on and those held out together."""
    share = math.ceil(100 * wanted / of) / 100
    if settings.data.heldout_sources:
        return "name more with --heldout"
    if share > 0.5:  # what may be held out at most
        return "to name others: --heldout FILE"
    most = settings.data.heldout_max_rows
    also = f" --set data.heldout_max_rows={wanted}" if most < wanted else ""
    return f"to hold out more: --set data.heldout_fraction={share:g}{also}"
