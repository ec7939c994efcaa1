"""The line of a file that is at fault, with a caret under the column."""

from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.cli.terminal.text import clean

if TYPE_CHECKING:
    from sftcli.errors import Location

_MAX_SOURCE_BYTES = 64 * 1024 * 1024
_COLUMNS = 72


def source_excerpt(location: "Location") -> tuple[str, str, str] | None:
    """Return line number, text of the line and blanks up to the column; ``None`` where any of them is not known.

    Of a long line only the part around the column is returned.
    """
    if location.file is None or location.line is None or location.column is None:
        return None
    source = _read_line(Path(location.file), location.line)
    if source is None or location.column > len(source) + 1:
        return None
    start = max(0, location.column - 1 - _COLUMNS // 2)
    shown = source[start : start + _COLUMNS]
    before = clean(shown[: location.column - 1 - start])
    return str(location.line), clean(shown), " " * len(before)


def _read_line(path: Path, line: int) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_SOURCE_BYTES:
            return None
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if number == line:
                    return text.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
    except OSError:
        pass  # the error itself is shown either way
    return None
