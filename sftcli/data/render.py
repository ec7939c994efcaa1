"""(the type only, so that others can import it; the renderer is being written)"""

from dataclasses import dataclass

import numpy as np

from sftcli.data.records import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row as the model sees it: ``input_ids`` (n,) int32 and ``loss_mask`` (n,) bool."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    origin: Origin
