"""What the number of rows that were prepared leaves in doubt, with the flag that changes it."""

import math
from collections.abc import Iterator

from sftcli.config.schema.settings import Settings
from sftcli.figures import FEW_ROWS, are_few, counted


def heldout_doubts(settings: Settings, *, train_rows: int, heldout_rows: int) -> Iterator[str]:
    """Yield that the held-out rows prove little, where they are few."""
    if not are_few(heldout_rows):
        return
    share = math.ceil(100 * FEW_ROWS / (train_rows + heldout_rows)) / 100
    if settings.data.heldout_sources:
        more = "name more with --heldout"
    elif share > 0.5:  # what may be held out at most
        more = "to name others: --heldout FILE"
    else:
        more = f"to hold out more: --set data.heldout_fraction={share:g}"
    yield f"{counted(heldout_rows, 'held-out row')} prove{'s' if heldout_rows == 1 else ''} little; {more}"
