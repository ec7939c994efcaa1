"""Conversations to try templates on, by kind: ordinary ones, white space at the ends, thinking, fields, tools, odd ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("rows.jsonl")


@dataclass(frozen=True)
class Row:
    """A conversation as it stands in a file."""

    name: str
    kind: str
    fields: dict[str, Any]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Return the turns that are trained."""
        return [message for message in self.fields["messages"] if message["role"] == "assistant"]


def read_rows() -> list[Row]:
    """Return all of them."""
    lines = map(json.loads, _FILE.read_text(encoding="utf-8").splitlines())
    return [Row(line.pop("name"), line.pop("kind"), line) for line in lines]
