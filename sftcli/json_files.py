"""JSON files: read with a limit of size, and written in one form."""

import json
from pathlib import Path
from typing import Any

from sftcli import storage
from sftcli.errors import DataError, SftError
from sftcli.foreign import damaged, foreign_file

MAX_JSON_BYTES = 128 << 20


def check_size(path: Path) -> None:
    """Raise where a text file is too large to be one that is read whole.

    Raises:
        DataError: It is.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise DataError(f"{path} has {size >> 20} MB; more than {MAX_JSON_BYTES >> 20} MB are not read")


def read_json(path: Path, *, hint: str = "name a folder in the Hugging Face format") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        hint: What to do where there is none, or another one is needed.

    Raises:
        NotFoundError, StorageError: It does not exist, or cannot be read.
        DataError: It holds something else.
    """
    with foreign_file(path, "is not valid JSON", hint=hint):
        check_size(path)
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise damaged(path, "holds no JSON object", hint=hint)
    return content


def read_json_or_nothing(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of this program, which may be missing, or damaged: then an empty one."""
    try:
        return read_json(path)
    except SftError:
        return {}


def json_text(value: object) -> str:
    """Return ``value`` as a file holds it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> dict[str, int | str]:
    """Write and sync a new file; return its size and hash as ``storage.write_file``."""
    return storage.write_file(path, [json_text(value).encode()])


def replace_json(path: Path, value: object) -> None:
    """Put ``value`` in the place of the file ``path``, whole or not at all."""
    storage.replace_file(path, json_text(value).encode())
