"""Whether a model has room for the rows: an embedding for each of their tokens, and positions for their length."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftcli.errors import MismatchError
from sftcli.events import EventSink, Warned
from sftcli.json_files import read_json
from sftcli.modeling.config_values import config_value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from sftcli.data.prepared.store import ExampleTable
    from sftcli.services.prepare.prepare import PreparedData

_SHOWN = 3
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_SPARE_ROWS = 2  # by which a table of positions may be longer than what it says, as that of OPT is


def require_room(prepared: "PreparedData", folder: Path, emit: EventSink) -> None:
    """Compare the prepared rows with what the configuration in a model ``folder`` says, where there is one.

    Raises:
        MismatchError: A row has a token without an embedding.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    text = config.get("text_config")
    values = config | (text if isinstance(text, dict) else {})
    if isinstance(rows := values.get("vocab_size"), int):
        _require_embeddings(prepared, rows)
    positions = next((values[name] for name in _POSITIONS if isinstance(values.get(name), int)), 0)
    if positions:
        _tell_long_rows(prepared, positions, emit)


def require_positions(model: "PreTrainedModel", prepared: "PreparedData") -> None:
    """Compare the prepared rows with the table of positions that ``model`` has learned, if it has one.

    Raises:
        MismatchError: A row is longer.
    """
    positions = next((value for name in _POSITIONS if (value := config_value(model, name))), 0)
    tokens = model.get_input_embeddings()
    sizes = [getattr(module, "num_embeddings", -1) for module in model.modules() if module is not tokens]
    if not any(positions <= size <= positions + _SPARE_ROWS for size in sizes):
        return
    longest = max(length for table in _tables(prepared) for length in table.num_tokens)
    if positions and longest > positions:
        raise MismatchError(
            f"a row has {longest:,} tokens, and {type(model).__name__} has learned {positions:,} positions",
            hint=f"cut rows with --max-tokens {positions} --overlong truncate, or leave them out with --overlong drop",
        )


def _require_embeddings(prepared: "PreparedData", rows: int) -> None:
    beyond = {int(token) for table in _tables(prepared) for token in table.ids_from(rows)}
    if not beyond:
        return
    names = [
        f"{prepared.tokenizer.decode([token], skip_special=False)!r} ({token:,})"
        for token in sorted(beyond)[:_SHOWN]
    ]
    more = f" and {len(beyond) - _SHOWN:,} more" if len(beyond) > _SHOWN else ""
    raise MismatchError(
        f"rows hold tokens that the model has no embedding for: {', '.join(names)}{more}; its embeddings have {rows:,} rows, "
        f"and the tokenizer has {prepared.tokenizer.vocab_size:,} tokens",
        hint="use the model's own tokenizer, or give the embeddings the rows that they lack "
        "(resize_token_embeddings of transformers) and save the model",
    )


def _tell_long_rows(prepared: "PreparedData", positions: int, emit: EventSink) -> None:
    lengths = np.concatenate([np.asarray(table.num_tokens, dtype=np.int64) for table in _tables(prepared)])
    if count := int((lengths > positions).sum()):
        emit(
            Warned(
                text=f"{count:,} of {len(lengths):,} rows are longer than the {positions:,} positions that the model was made "
                f"for, up to {lengths.max():,} tokens: --max-tokens {positions} avoids that"
            )
        )


def _tables(prepared: "PreparedData") -> "Iterator[ExampleTable]":
    dataset = prepared.dataset
    yield from (table for table in (dataset.train, dataset.heldout, dataset.text) if len(table))
