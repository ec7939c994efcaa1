"""What can be a path, checked where one enters: the libraries have an error of their own for each that cannot."""

import os
from pathlib import Path
from typing import Annotated

from sftcli.errors import UsageError

_MAX_NAME, _MAX_PATH = 255, 4095  # bytes of a name, and of all of it, on the systems there are


def as_path(text: str | Path) -> Path:
    """Return ``text`` as a path, ``~`` at its beginning as a shell has it.

    Raises:
        UsageError: It cannot be one: a name in it is too long, it holds a NUL or half a character, or a user is unknown.
    """
    named = str(text)
    try:
        size = max(map(len, os.fsencode(named).split(b"/")))
        named.encode()
    except UnicodeError:
        raise _no_path(named, "holds half a character") from None
    if "\0" in named:
        raise _no_path(named, "holds a NUL")
    if size > _MAX_NAME or len(os.fsencode(named)) > _MAX_PATH:
        raise _no_path(
            named, f"is too long for a path: a name may have {_MAX_NAME} bytes, all of it {_MAX_PATH:,}"
        )
    try:
        return Path(named).expanduser()
    except RuntimeError:
        raise _no_path(named, "names the home of an unknown user") from None


# Text in a file of ours that is used as a path: ``own_files.as_form`` lets none through that cannot be one.
PathText = Annotated[str, as_path]


def _no_path(text: str, why: str) -> UsageError:
    shown = ascii(text)
    return UsageError(f"{shown if len(shown) <= 60 else shown[:57] + '...'} {why}")
