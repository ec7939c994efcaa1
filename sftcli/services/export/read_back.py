"""What was written is opened again before it gets its name, and must compute what the model does."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from sftcli import storage
from sftcli.data.general.general import general_texts
from sftcli.errors import OutputError, StorageError
from sftcli.events import EventSink, Notice, Session, Warned
from sftcli.figures import size
from sftcli.foreign import foreign_file
from sftcli.modeling.config_values import positions_of
from sftcli.modeling.formats.folder_write import exact_dtype
from sftcli.modeling.formats.logits import Agreement, agreement, logits_with, own_numbers
from sftcli.modeling.formats.pt_file import read_pt, write_model_folder
from sftcli.modeling.formats.stored_tensors import stored_tensors
from sftcli.modeling.load import load_model
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.runtime import free_memory_bytes
from sftcli.services.export.request import HINT, ExportRequest
from sftcli.services.models.choose import ModelChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EVERY_PASSAGE, _PLACES = 5, 48  # of the general text that logits are compared on, and tokens of each
_EXACT = 1e-4  # of the spread of logits, by which the same numbers may differ
_ROOM = 1.2  # times the bytes of a folder, which opening it takes


def compared_ids(choice: ModelChoice, model: "PreTrainedModel") -> torch.Tensor:
    """Return the tokens that logits are compared on, (rows, places): the beginnings of a few passages of the general text."""
    tokenizer = read_tokenizer_files(choice.tokenizer_folder).tokenizer
    texts = [text.text for text in general_texts() if not text.question][::_EVERY_PASSAGE]
    rows = [encoded.ids for encoded in tokenizer.encode_batch_fast(texts)]
    places = min(_PLACES, positions_of(choice.weights_folder) or _PLACES, *map(len, rows))
    embeddings = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    return torch.tensor([row[:places] for row in rows]).clamp(max=embeddings - 1)


def compare_folder(
    folder: Path, choice: ModelChoice, model: "PreTrainedModel", *, dtype: torch.dtype | None, emit: EventSink
) -> Agreement | None:
    """Open ``folder``, which holds ``model`` in ``dtype``, or as it is, and compare; None where memory is short for a second model.

    Raises:
        StorageError: It computes something else.
    """
    need = _ROOM * sum(tensor.end - tensor.begin for tensor in stored_tensors(folder).values())
    if need > free_memory_bytes():
        emit(
            Notice(
                text=f"read back by its tensors alone: opening it as well would take {size(math.ceil(need))} of memory"
            )
        )
        return None
    with foreign_file(folder, "cannot be read back"):
        again = load_model(
            folder, dtype=exact_dtype(folder), device=torch.device("cpu"), attention=choice.attention
        )

    def rounded(_name: str, own: torch.Tensor) -> torch.Tensor:
        return (own if dtype is None else own.to(dtype)).float()

    ids = compared_ids(choice, model)
    found = agreement(logits_with(model, ids, rounded), logits_with(again, ids, own_numbers), limit=_EXACT)
    if not found.is_near:
        raise StorageError(
            f"{folder.name} failed verification after writing: {found.in_words()}",
            hint="its tensors are right, so its configuration is not: please report this with the name of the model",
        )
    emit(Notice(text=f"read back: {found.in_words()}"))
    return found


def compare_pt(
    path: Path, choice: ModelChoice, model: "PreTrainedModel", emit: EventSink
) -> Agreement | None:
    """Open the ``.pt`` file of ``model`` at ``path`` as a training would, and compare; as ``compare_folder``."""
    with storage.scratch_folder(path.parent, hint=HINT) as scratch:
        write_model_folder(read_pt(path), scratch)
        return compare_folder(scratch, choice, model, dtype=None, emit=emit)


def require_near(found: Agreement, kind: str, request: ExportRequest, session: Session) -> None:
    """Say how near the file is.

    Raises:
        OutputError: It is further away than its rounding explains, and the user did not say that this is fine.
    """
    if found.is_near:
        session.emit(Notice(text=f"read back: {found.in_words()}"))
    elif request.accepts_rounding:
        session.emit(Warned(text=f"as {kind} it computes something else: {found.in_words()}"))
    else:
        raise OutputError(
            f"as {kind} the model would compute something else: {found.in_words()}",
            hint="choose a --dtype that rounds less, such as q8_0 or bf16; --accept-rounding writes it all the same",
        )
