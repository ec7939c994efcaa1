"""A model with tokens that it did not have: a folder in the cache with its files, where only what must differ is another.

The tokenizer has the new tokens, and token embeddings and head have a row for each; where they had rows to spare, those are
taken. A new row is the mean of the rows of all tokens that were known, in float64 and in the order of the rows: it does not
depend on a seed or on the machine. (``resize_token_embeddings`` of transformers adds noise of 3e-5 of their spread to that.)
Whatever starts from this folder trains, writes and reads it as any other, and nothing later asks which rows are new.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sftcli import storage
from sftcli.cache import CACHE_HINT
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice
from sftcli.json_files import read_json, replace_json
from sftcli.modeling.formats.cached_source import (
    SOURCE_FILE,
    SOURCES,
    CachedSource,
    file_sizes,
    whole_source,
    write_source,
)
from sftcli.modeling.formats.folder_write import TEMPLATE_FOLDER, sections
from sftcli.modeling.formats.gguf.gguf_import import models_folder
from sftcli.modeling.formats.identity import file_stamps
from sftcli.modeling.formats.source_tensors import SourceTensors
from sftcli.modeling.formats.stored_tensors import FLOATS, StoredTensor, copied_file_parts, read_tensor
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.load import load_layout
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.modeling.modern_lm.config import MODEL_TYPE
from sftcli.modeling.tokenizer.files import TokenizerFiles, read_tokenizer_files
from sftcli.modeling.tokenizer.new_tokens import add_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 1
_CHUNK_ROWS = 4096
_COPIED = (".json", ".jinja", ".txt", ".model", ".md")


def with_new_tokens(located: LocatedModel, tokens: Sequence[str], emit: EventSink) -> LocatedModel:
    """Return ``located`` with ``tokens``, those that its tokenizer has already left as they are.

    Raises:
        UsageError: The model cannot take any.
        DataError: A file is damaged, or the tokenizer does not take one of them.
    """
    files = read_tokenizer_files(located.folder)
    known = {text: token for text in tokens if (token := files.tokenizer.token_to_id(text)) is not None}
    if known:
        shown = ", ".join(f"{text!r} ({token:,})" for text, token in known.items())
        emit(Notice(text=f"{located.name} has these tokens already, which stay as they are: {shown}"))
    wanted = [text for text in tokens if text not in known]
    if not wanted:
        return located
    _refuse_kind(located)
    folder = models_folder() / f"tokens-{_key(located, wanted)}"
    if whole_source(folder) is None:
        with storage.atomic_folder(folder, hint=CACHE_HINT) as fresh:
            _make(located, files, wanted, fresh)
    made = SOURCES.read(folder / SOURCE_FILE)
    shown = ", ".join(f"{text!r} ({token:,})" for text, token in made.ids.items())
    emit(
        Notice(text=f"new tokens: {shown}; the embeddings have {made.rows:,} rows, had {made.rows_before:,}")
    )
    return replace(located, folder=folder, new_tokens=made.ids)


def _refuse_kind(located: LocatedModel) -> None:
    config = read_json(located.folder / "config.json")
    if config.get("model_type") == MODEL_TYPE:
        raise _refused(f"{located.name} is a Modern LLM model, whose program has a fixed set of tokens")
    if config.get("quantization_config"):
        raise _refused(f"the weights of {located.name} are quantized")


def _refused(why: str) -> UsageError:
    return UsageError(
        f"model.new_tokens cannot be added: {why}",
        hint="leave model.new_tokens out, or name another model",
        location=Location(key="model.new_tokens"),
    )


def _key(located: LocatedModel, tokens: Sequence[str]) -> str:
    parts = [_FORMAT, located.revision, file_stamps(located.folder), list(tokens)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _make(located: LocatedModel, files: TokenizerFiles, tokens: Sequence[str], folder: Path) -> None:
    """Fill ``folder``. Files of weights that do not change are links: they may be most of the model."""
    if (located.folder / TEMPLATE_FOLDER).is_dir():
        storage.make_folders(folder / TEMPLATE_FOLDER)
    for path in (*located.folder.iterdir(), *(located.folder / TEMPLATE_FOLDER).glob("*.jinja")):
        if path.suffix in _COPIED and path.name != SOURCE_FILE and path.is_file():
            storage.copy_file(path, folder / path.relative_to(located.folder))
    ids = add_tokens(folder, tokens)
    source = _SourceRows.of(located)
    after = max(source.rows, *(token + 1 for token in ids.values()))
    if after > source.rows and source.second_table:
        raise _refused(
            f"{source.second_table} of {located.name} has a row for each token too, and no room for more"
        )
    known = min(source.rows, files.tokenizer.get_vocab_size(with_added_tokens=True))
    for path in sorted({tensor.path for tensor in source.stored.values()}):
        tensors = {name: tensor for name, tensor in source.stored.items() if tensor.path == path}
        grown = {
            name: _grown(read_tensor(tensor), list(ids.values()), known=known, rows=after)
            for name, tensor in tensors.items()
            if name in source.by_token
        }
        if grown:
            storage.write_file(folder / path.name, copied_file_parts(tensors, replaced=grown))
        else:
            storage.disk.link(folder / path.name, path.resolve())
    _write_size(folder, before=source.rows, after=after)
    sizes = file_sizes(folder)
    write_source(
        folder, CachedSource(files=sizes, model=located.name, ids=ids, rows=after, rows_before=source.rows)
    )


class _SourceRows:
    """The tensors of a model's files, and which of them have a row for each token."""

    def __init__(
        self, stored: Mapping[str, StoredTensor], by_token: Sequence[str], rows: int, second_table: str
    ) -> None:
        self.stored = stored
        self.by_token = by_token
        self.rows = rows
        self.second_table = (
            second_table  # of embeddings by token, which each layer of Gemma 4 has; "" for none
        )

    @classmethod
    def of(cls, located: LocatedModel) -> "_SourceRows":
        """Find them.

        Raises:
            UsageError: They are not what transformers calls embeddings and head, or are no plain numbers.
        """
        quiet_libraries()
        layout = load_layout(located.folder)
        source = SourceTensors.of(layout, located.folder)
        names = _names_by_token(layout)
        by_token = [name for name, place in source.places.items() if place.name in names]
        found = [source.stored[name] for name in by_token]
        rows = {tensor.shape[0] for tensor in found}
        if len(rows) != 1 or any(
            source.places[name].is_converted or source.stored[name].dtype not in FLOATS for name in by_token
        ):
            raise _refused(f"{type(layout).__name__} has no plain rows of numbers for its tokens")
        (before,) = rows
        beside = [name for name, tensor in source.beside.items() if tensor.shape[:1] == (before,)]
        if beside:
            raise _refused(
                f"{located.name} holds {beside[0]} beside the language model, which would lack their rows"
            )
        others = (
            name
            for name, module in layout.named_modules()
            if getattr(module, "num_embeddings", 0) == before and module is not layout.get_input_embeddings()
        )
        return cls(source.stored, by_token, before, next(others, ""))


def _names_by_token(layout: "PreTrainedModel") -> set[str]:
    """Return the names of the parameters with a row for each token."""
    layers = (layout.get_input_embeddings(), layout.get_output_embeddings())
    owned = {
        id(weight) for layer in layers if layer is not None for weight in layer.parameters(recurse=False)
    }
    return {name for name, weight in layout.named_parameters(remove_duplicate=False) if id(weight) in owned}


def _grown(tensor: torch.Tensor, ids: Sequence[int], *, known: int, rows: int) -> torch.Tensor:
    """Return ``tensor`` (before, ...) with ``rows`` rows, of which those of ``ids``, and all behind it, are the mean of ``known``."""
    total = np.zeros(tuple(tensor.shape[1:]))
    for begin in range(0, known, _CHUNK_ROWS):
        total += tensor[begin : min(begin + _CHUNK_ROWS, known)].double().numpy().sum(axis=0)
    mean = torch.from_numpy(np.asarray(total / known)).to(tensor.dtype)
    grown = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = mean
    grown[list(ids)] = mean
    return grown


def _write_size(folder: Path, *, before: int, after: int) -> None:
    """Say in the configuration how many rows there are."""
    config = read_json(folder / "config.json")
    parts = sections(config)
    told = [section for section in parts if section.get("vocab_size") == before]
    for section in told or parts[-1:]:  # none where it is the default of the class
        section["vocab_size"] = after
    replace_json(folder / "config.json", config)
