"""Which keys a query may see: causality, documents in one row, padding, and sinks."""

import torch
from torch import Tensor
from torch.nn import functional


def visible_keys(positions: Tensor, attention_mask: Tensor | None, *, past: int, sinks: int) -> Tensor | None:
    """Return which keys each query sees, (B or 1, 1, T, sinks + past + T), or None where plain causality says it all.

    Documents in one row are told by positions that do not go on by one; they see the sinks and themselves.
    """
    if (
        attention_mask is not None and attention_mask.dim() == 4
    ):  # the caller says all of it: (B, 1, T, past + T)
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        return functional.pad(seen, (sinks, 0), value=True)
    width = positions.shape[1]
    packed = past == 0 and bool((positions.diff(dim=1) != 1).any())
    if attention_mask is None and not packed and not sinks and (past == 0 or width == 1):
        return None
    place = torch.arange(past + width, device=positions.device)
    queries = place[past:]
    seen = (place[None, :] <= queries[:, None])[None]
    if packed:
        starts = functional.pad(positions.diff(dim=1) != 1, (1, 0))
        document = starts.cumsum(dim=1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    if attention_mask is not None:
        # A padded query sees itself, so that no row of scores is empty.
        seen = seen & (attention_mask[:, None, :].bool() | (place[None, :] == queries[:, None])[None])
    seen = seen[:, None]
    return functional.pad(seen, (sinks, 0), value=True) if sinks else seen
