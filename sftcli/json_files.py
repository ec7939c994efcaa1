"""JSON files: read with a limit of size, and written in one form."""

import json
import re
from pathlib import Path
from typing import Any

from sftcli import storage
from sftcli.foreign import damaged, foreign_file
from sftcli.input_files import read_whole

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of one, which is right beside the other


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
        text = read_whole(path).decode("utf-8-sig")
        content = json.loads(text)
    if _HALF.search(text) and not _is_writable(content):
        raise damaged(path, "holds half of a surrogate pair", hint=hint)
    if not isinstance(content, dict):
        raise damaged(path, "holds no JSON object", hint=hint)
    return content


def _is_writable(content: object) -> bool:
    """Return whether a file of ours, or a library that is handed ``content``, can hold each character of it."""
    try:
        json_text(content).encode()
    except UnicodeEncodeError:
        return False
    return True


def json_text(value: object) -> str:
    """Return ``value`` as a file holds it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> dict[str, int | str]:
    """Write and sync a new file; return its size and hash as ``storage.write_file``."""
    return storage.write_file(path, [json_text(value).encode()])


def replace_json(path: Path, value: object, *, kind: str = storage.TEMPORARY) -> None:
    """Put ``value`` in the place of the file ``path``, whole or not at all; ``kind`` as in ``storage.replace_file``."""
    storage.replace_file(path, json_text(value).encode(), kind=kind)
