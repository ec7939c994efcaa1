"""A row as it was read, and the place it came from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row came from."""

    path: str
    line: int  # 1-based; the row number in files that have no lines

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """One row as it was read, before anything is known about its format."""

    fields: Mapping[str, object]
    origin: Origin
