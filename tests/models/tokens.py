"""Which tokens go with the template of which name, and where the templates of one habit each are."""

import tomllib
from pathlib import Path
from typing import Any

HABITS = Path(__file__).with_name("templates")


def tokens_of(name: str) -> dict[str, Any] | None:
    """Return the tokens of the model whose name ``name`` begins with."""
    tables = tomllib.loads(Path(__file__).with_name("tokens.toml").read_text(encoding="utf-8"))["tokens"]
    known = {_letters(model): table for table in tables for model in table["models"]}
    fitting = [model for model in known if _letters(name).startswith(model)]
    return known[max(fitting, key=len)] if fitting else None


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())
