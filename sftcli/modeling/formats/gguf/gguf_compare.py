"""Whether a GGUF file computes what its model does."""

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch

from sftcli.modeling.formats.gguf.gguf_families import check_family
from sftcli.modeling.formats.gguf.gguf_kinds import logits_limit
from sftcli.modeling.formats.gguf.gguf_tensors import StoredNumbers
from sftcli.modeling.formats.logits import Agreement, agreement, logits_with, own_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compare_file(path: Path, model: "PreTrainedModel", ids: torch.Tensor) -> Agreement:
    """Compare the file of ``model`` at ``path`` on the tokens ``ids``, (rows, places)."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    numbers = StoredNumbers(stored, model.config, check_family(model))
    ours = logits_with(model, ids, own_numbers)
    theirs = logits_with(model, ids, lambda name, _own: numbers(name))
    return agreement(ours, theirs, limit=logits_limit({tensor.tensor_type for tensor in stored.values()}))
