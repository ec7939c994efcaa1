"""Load a model to write it."""

from typing import TYPE_CHECKING

import torch

from sftcli.events import EventSink, Notice
from sftcli.figures import short_count
from sftcli.modeling.formats.folder_write import exact_dtype
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.load import count_parameters
from sftcli.runtime import dtype_name
from sftcli.services.models.choose import ModelChoice, load_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_to_write(choice: ModelChoice, emit: EventSink, dtype: torch.dtype) -> "PreTrainedModel":
    """Load the model on the CPU, an adapter merged, and say so."""
    quiet_libraries()
    model = load_choice(choice, dtype=dtype, device=torch.device("cpu"))
    total, _ = count_parameters(model)
    # Nothing is trained with it, so neither a device nor a precision of products belongs here.
    emit(Notice(text=f"model {choice.name}: {short_count(total)} parameters, read as {dtype_name(dtype)}"))
    return model


def unrounded_dtype(choice: ModelChoice) -> torch.dtype:
    """Return the dtype in which nothing is rounded before it is written."""
    return exact_dtype(choice.folder) if choice.base is None else torch.float32
