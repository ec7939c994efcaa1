"""Whether a model has room for the rows: an embedding for each of their tokens, and positions for their length."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftcli.errors import MismatchError
from sftcli.events import EventSink, Notice, Warned
from sftcli.json_files import read_json
from sftcli.modeling.config_values import POSITIONS, SPARE_ROWS, learned_positions
from sftcli.modeling.formats.folder_check import tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from sftcli.data.prepared.store import ExampleTable
    from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
    from sftcli.services.prepare.prepare import PreparedData

_SHOWN = 3
_TABLE = re.compile(
    r"(?:.*\.)?(?:wpe|\w*pos\w*)(?:\.weight)?"
)  # its name, in the families that learn positions
_RESIZE = "use the model's own tokenizer, or give the embeddings the rows that they lack (resize_token_embeddings of transformers) and save the model"


def require_room(prepared: "PreparedData", folder: Path, emit: EventSink) -> None:
    """Compare the prepared rows and their tokenizer with what a model ``folder`` says, where it says it.

    Raises:
        MismatchError: A row, or what fills rows up, has a token without an embedding; or a row is longer than the positions
            that the model has learned.
    """
    values = _values_of(folder)
    if isinstance(rows := values.get("vocab_size"), int):
        require_embeddings(prepared, rows)
        _tell_spare_tokens(prepared.tokenizer, rows, emit)
    positions = _stated_positions(values)
    lengths = np.array([length for table in _tables(prepared) for length in table.num_tokens] or [0])
    if not positions or lengths.max() <= positions:
        return
    if any(_is_table(name, shape, positions) for name, shape in tensor_shapes(folder).items()):
        raise _too_long(int(lengths.max()), "the model", positions)
    _tell_long_rows(lengths, _scaled(positions, values), emit)


def positions_of(folder: Path) -> int:
    """Return how many positions the model in ``folder`` was made for; 0 where it does not say."""
    values = _values_of(folder)
    positions = _stated_positions(values)
    return _scaled(positions, values) if positions else 0


def _values_of(folder: Path) -> Mapping[str, object]:
    """Return what a model folder says of its text model; nothing where it has no configuration."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    text = config.get("text_config")
    return config | (text if isinstance(text, dict) else {})


def _stated_positions(values: Mapping[str, object]) -> int:
    return next((value for name in POSITIONS if isinstance(value := values.get(name), int)), 0)


def require_embeddings(prepared: "PreparedData", rows: int) -> None:
    """Make sure that a model whose embeddings have ``rows`` rows has one for each token of the prepared rows.

    Raises:
        MismatchError: It has not.
    """
    tokenizer = prepared.tokenizer
    if beyond := {int(token) for table in _tables(prepared) for token in table.ids_from(rows)}:
        raise MismatchError(
            f"rows hold tokens that the model has no embedding for: {_named(beyond, tokenizer)}; its embeddings have {rows:,} "
            f"rows, and the tokenizer has {tokenizer.vocab_size:,} tokens",
            hint=_RESIZE,
        )
    if tokenizer.pad_id >= rows:
        raise MismatchError(
            f"the padding token {_named([tokenizer.pad_id], tokenizer)} has no embedding: those of the model have {rows:,} rows",
            hint='set "pad_token" in tokenizer_config.json to the stop token, which has one; or ' + _RESIZE,
        )


def require_positions(model: "PreTrainedModel", prepared: "PreparedData") -> None:
    """Compare the prepared rows with the table of positions that ``model`` has learned, if it has one.

    Raises:
        MismatchError: A row is longer.
    """
    positions = learned_positions(model)
    longest = max(length for table in _tables(prepared) for length in table.num_tokens)
    if positions and longest > positions:
        raise _too_long(longest, type(model).__name__, positions)


def _is_table(name: str, shape: list[int], positions: int) -> bool:
    return (
        len(shape) == 2  # (positions, D)
        and positions <= shape[0] <= positions + SPARE_ROWS
        and _TABLE.fullmatch(name) is not None
    )


def _too_long(longest: int, model: str, positions: int) -> MismatchError:
    return MismatchError(
        f"a row has {longest:,} tokens, and {model} has learned {positions:,} positions",
        hint=f"cut rows with --max-tokens {positions} --overlong truncate, or leave them out with --overlong drop",
    )


def _scaled(positions: int, values: Mapping[str, object]) -> int:
    """Return how far positions reach that are turned slower than at first; a window over them is no limit.

    Where layers differ in that, ``positions`` is how far they reach.
    """
    for key in ("rope_parameters", "rope_scaling"):
        scaling = values.get(key)
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        if isinstance(scaling, dict) and isinstance(factor, int | float):
            first = scaling.get("original_max_position_embeddings") or values.get(
                "original_max_position_embeddings"
            )
            positions = max(positions, round(factor * (first if isinstance(first, int) else positions)))
            break  # the other one says the same
    return positions


def _tell_spare_tokens(tokenizer: "HFChatTokenizer", rows: int, emit: EventSink) -> None:
    """Tell of special tokens without an embedding. No row has one, so nothing is wrong until a prompt does."""
    if beyond := {token for token in tokenizer.control_ids | tokenizer.stop_ids if token >= rows}:
        emit(
            Notice(
                text=f"the tokenizer has special tokens that the model has no embedding for: {_named(beyond, tokenizer)}; the rows "
                "hold none of them"
            )
        )


def _tell_long_rows(lengths: np.ndarray, positions: int, emit: EventSink) -> None:
    if count := int((lengths > positions).sum()):
        emit(
            Warned(
                text=f"{count:,} of {len(lengths):,} rows are longer than the {positions:,} positions that the model was made "
                f"for, up to {lengths.max():,} tokens: --max-tokens {positions} avoids that"
            )
        )


def _named(tokens: Collection[int], tokenizer: "HFChatTokenizer") -> str:
    names = [
        f"{tokenizer.decode([token], skip_special=False)!r} ({token:,})" for token in sorted(tokens)[:_SHOWN]
    ]
    return ", ".join(names) + (f" and {len(tokens) - _SHOWN:,} more" if len(tokens) > _SHOWN else "")


def _tables(prepared: "PreparedData") -> "Iterator[ExampleTable]":
    dataset = prepared.dataset
    yield from (table for table in (dataset.train, dataset.heldout, dataset.text) if len(table))
