"""Words of a command line in the form that the parser takes: a setting in two words, and ``help`` as a word."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SECTIONS = (
    "run",
    "model",
    "data",
    "training",
    "adapter",
    "checkpoint",
    "sampling",
)  # of the settings, which are slow to import
_KEY = re.compile(rf"({'|'.join(SECTIONS)})\.[a-z_0-9]+=?")
# ``sft generate help`` asks a model for help.
_TAKES_TEXT = ("generate",)


def meant(words: Sequence[str]) -> list[str]:
    """Return ``words`` with each ``--set KEY VALUE`` as ``--set KEY=VALUE``, and with ``--help`` for ``help``."""
    if words and words[0] == "help":
        return [*words[1:], "--help"]
    if len(words) == 2 and words[1] == "help" and words[0] not in _TAKES_TEXT and not Path("help").exists():
        return [words[0], "--help"]
    return list(_joined(words))


def _joined(words: Sequence[str]) -> Iterator[str]:
    """Yield ``words``, what follows ``--set`` joined: ``KEY VALUE``, ``KEY = VALUE``, ``KEY= VALUE`` and ``KEY =VALUE``."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        yield word
        if word == "--":
            yield from rest
            return
        if word != "--set" or not rest or not _KEY.fullmatch(rest[0]):
            continue
        key = rest.pop(0).removesuffix("=")
        value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if value == "=" and rest and not rest[0].startswith("--"):
            value += rest.pop(0)
        yield f"{key}={value.removeprefix('=')}" if value else key
