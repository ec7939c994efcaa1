"""Supervised fine-tuning of causal language models: the command ``sft``, and three calls for Python (``sftcli.api``)."""

from typing import TYPE_CHECKING

from sftcli.version import __version__

if TYPE_CHECKING:
    from sftcli.api import generate, prepare, train


_CALLS = ("generate", "prepare", "train")
__all__ = ["__version__", "generate", "prepare", "train"]


def __getattr__(name: str) -> object:
    """Import a call when it is first asked for: the command line needs none of them."""
    if name not in _CALLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sftcli import api

    return getattr(api, name)
