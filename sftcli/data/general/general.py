"""The passages and questions of ``general.jsonl``."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VERSION = 1
_FILE = Path(__file__).with_name("general.jsonl")
QUESTION = "question"


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralText:
    """A passage of a kind, or a question with its answer; ``question`` is "" of a passage."""

    kind: str
    text: str
    question: str = ""


@cache
def general_texts() -> tuple[GeneralText, ...]:
    """Return all of them, in the order of the file: passages, then questions."""
    return tuple(
        GeneralText(kind=row["kind"], text=row.get("text") or row["answer"], question=row.get("question", ""))
        for row in map(json.loads, _FILE.read_text(encoding="utf-8").splitlines())
    )
