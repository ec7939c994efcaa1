"""Code that comes with a model: refused, unless the user named the hub model and the commit whose code may run.

What runs is what that commit holds, beside its weights. Code of another repository, which a configuration can name
without a commit, and code in local folders, which can change between two looks, stay refused.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli import storage
from sftcli.errors import ConsentError, UsageError
from sftcli.events import Warned
from sftcli.modeling.folder import read_json

if TYPE_CHECKING:
    from sftcli.events import EventSink

AUTO_MAP = "auto_map"
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def refuse_code(folder: Path) -> None:
    """Raise where the model in ``folder`` cannot be loaded without running code that lies beside it.

    Raises:
        ConsentError: It asks for that.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    is_known = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not config.get(AUTO_MAP) or (is_known and not any(folder.glob("*.py"))):
        return  # without files of its own a known model can only be the library's class
    raise ConsentError(
        f"{folder / 'config.json'} asks to run code that comes with the model (auto_map), which is not done here",
        hint="use a model that transformers knows by itself; if it knows this one, remove auto_map and the .py files. To "
        "train a hub model whose code you have read: --trust-remote-code --set model.revision=COMMIT",
    )


def allow_code(folder: Path, *, name: str, commit: str, emit: "EventSink") -> dict[str, str]:
    """Return what may run, for the record, and tell it loudly; empty where the model brings no code.

    Raises:
        ConsentError: The code of another repository is asked for.
        UsageError: ``name`` is not a model of the hub.
    """
    if folder.name != commit:
        raise UsageError(
            f"--trust-remote-code applies to models of the hub at a commit, and {name} is none",
            hint="leave --trust-remote-code out",
        )
    for reference in _references(folder):
        if "--" in reference:
            raise ConsentError(
                f"{folder} asks to run code of another repository ({reference}), whose commit is not pinned",
                hint="use another model",
            )
    files = sorted(folder.glob("*.py"))
    if not files:
        return {}
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    shown = ", ".join(file.name for file in files)
    emit(
        Warned(
            text=f"code of {name} at {commit} runs with your rights, because --trust-remote-code was passed: {shown}"
        )
    )
    return {"model": name, "commit": commit, "files": shown, "sha256": digest.hexdigest()}


def copy_code(model: object, source: Path, folder: Path) -> dict[str, object]:
    """Let the code of a ``model`` that brought its own go along with its weights; return what a configuration says of it.

    Here the copy is refused like any other local code; transformers opens it with its ``trust_remote_code``.
    """
    if not type(model).__module__.startswith("transformers_modules."):
        return {}
    for file in sorted(source.glob("*.py")):
        storage.copy_file(file, folder / file.name)
    return {AUTO_MAP: read_json(source / "config.json")[AUTO_MAP]}


def _references(folder: Path) -> list[str]:
    """Return every ``module.Class`` that a configuration asks for, at any depth."""
    found: list[str] = []
    waiting: list[tuple[bool, object]] = [
        (False, read_json(folder / name)) for name in _CONFIGS if (folder / name).is_file()
    ]
    while waiting:
        is_map, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(is_map or key == AUTO_MAP, part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(is_map, part) for part in value]
        elif is_map and isinstance(value, str):
            found.append(value)
    return found
