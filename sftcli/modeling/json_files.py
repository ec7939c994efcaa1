"""JSON files of model folders, read with a limit of size."""

import json
from pathlib import Path
from typing import Any

from sftcli.errors import DataError, NotFoundError

MAX_JSON_BYTES = 128 << 20


def check_size(path: Path) -> None:
    """Raise if a text file of a model folder is too large to read into memory.

    Raises:
        DataError: It is.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise DataError(f"{path} has {size >> 20} MB; the limit is {MAX_JSON_BYTES >> 20} MB")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        NotFoundError: It does not exist.
        DataError: It holds something else.
    """
    try:
        check_size(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"{path} does not exist", hint="name a folder in the Hugging Face format"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return content
