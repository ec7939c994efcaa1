"""Spares a search for documents that waits for the device, where it is known what it would find.

Before each pass transformers looks whether positions begin anew within a row, and waits for the device to know it. Positions that
a model numbers itself never do; and where attention is told of documents, it does not need the mask that this is for.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import masking_utils

from sftcli.runtime import body_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEARCH = "find_packed_sequence_indices"
_MARK = "_sft_is_told"
_numbers_itself: ContextVar[bool] = ContextVar("numbers_itself", default=False)


def spare_search(position_ids: torch.Tensor | None) -> None:
    """Let no mask look for documents in ``position_ids``, this very tensor: attention is told of them."""
    _listen()
    if position_ids is not None:
        setattr(position_ids, _MARK, True)


def spare_search_of_own_positions(model: "PreTrainedModel") -> None:
    """Let no mask of ``model`` look for documents in passes that are given no positions."""
    _listen()

    def begin(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - torch's
        _numbers_itself.set(len(args) < 2 and kwargs.get("position_ids") is None)

    def end(*_: object) -> None:
        _numbers_itself.set(False)

    body = body_of(model)
    body.register_forward_pre_hook(begin, with_kwargs=True)
    body.register_forward_hook(end, always_call=True)


def _listen() -> None:
    """Put a look at what is known before the search, once; a release that does not search is left as it is."""
    search = getattr(masking_utils, _SEARCH, None)
    if search is None or hasattr(search, _MARK):
        return

    def search_unless_known(
        position_ids: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | None:
        if _numbers_itself.get() or getattr(position_ids, _MARK, False):
            return None
        return cast("torch.Tensor | None", search(position_ids, *args, **kwargs))

    setattr(search_unless_known, _MARK, True)
    cast("Any", masking_utils).find_packed_sequence_indices = search_unless_known
