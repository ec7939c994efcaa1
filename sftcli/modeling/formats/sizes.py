"""How large models are in memory, read from the headers of their files."""

import math
from pathlib import Path

from sftcli.config.schema.adapter import AdapterSettings
from sftcli.json_files import read_json
from sftcli.modeling.formats.folder_check import tensor_shapes


def embedding_bytes(folder: Path) -> int:
    """Return the float32 size of the token embeddings and the head in a model folder: one row for each token."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return parameters_bytes(folder, rows=rows) if isinstance(rows, int) else 0


def parameters_bytes(folder: Path, *, rows: int | None = None) -> int:
    """Return the float32 size of the weights in a model folder, from the headers of its files.

    With ``rows``, of the matrices with that many rows only.
    """
    return sum(
        4 * math.prod(shape)
        for shape in tensor_shapes(folder).values()
        if rows is None or (len(shape) == 2 and shape[0] == rows)
    )


def adapter_bytes(folder: Path, settings: AdapterSettings) -> int:
    """Return about the most that an adapter for the model in ``folder`` takes in float32, from its files' headers."""
    matrices = (shape for shape in tensor_shapes(folder).values() if len(shape) == 2)
    return sum(4 * settings.rank * sum(shape) for shape in matrices)
