"""Code that comes with a model: refused, unless the user named the hub model and the commit whose code may run.

What runs is what that commit holds, beside its weights, or the copy of it in a run's folders, which has to be equal byte
for byte to what ran in training. Code of another repository, which a configuration can name without a commit, and code in
any other local folder, of which nobody knows whose it is, stay refused.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli import storage
from sftcli.errors import ConsentError, UsageError
from sftcli.events import Warned
from sftcli.input_files import read_whole
from sftcli.json_files import read_json

if TYPE_CHECKING:
    from sftcli.events import EventSink

AUTO_MAP = "auto_map"
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def refuse_code(folder: Path) -> None:
    """Raise if the model in ``folder`` cannot be loaded without running its own code.

    Raises:
        ConsentError: It asks for that.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    is_known = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not config.get(AUTO_MAP) or (is_known and not any(folder.glob("*.py"))):
        return  # without files of its own a known model can only be the library's class
    raise ConsentError(
        f"{folder / 'config.json'} requires code that comes with the model (auto_map), which is not run here",
        hint="use a model that transformers supports natively; if it supports this one, remove auto_map and the .py files. To "
        "train a hub model whose code you have read: --trust-remote-code --set model.revision=COMMIT. To generate with "
        "or evaluate the tuned model: --trust-remote-code again",
    )


def allow_code(folder: Path, *, name: str, commit: str, emit: "EventSink") -> dict[str, str]:
    """Return the code files that may run, for the record, with a warning; empty if the model has no code.

    Raises:
        ConsentError: The code of another repository is asked for.
        UsageError: ``name`` is not a model of the hub.
    """
    if folder.name != commit:
        raise UsageError(
            f"--trust-remote-code applies to hub models at a commit, and {name} is not one",
            hint="leave --trust-remote-code out",
        )
    digest, shown = _look_through(folder)
    if not shown:
        return {}
    _tell(f"{name} at {commit}", shown, emit)
    return {"model": name, "commit": commit, "files": shown, "sha256": digest}


def allow_copied_code(folder: Path, *, trusted: Mapping[str, str], emit: "EventSink") -> bool:
    """Return whether code in ``folder`` of a run may run, with a warning; false if there is none.

    Args:
        folder: With a model that the run has made.
        trusted: What ``allow_code`` returned when it was trained, from the run's record; empty where nothing was.
        emit: Is told.

    Raises:
        ConsentError: The code is not, byte for byte, what ran in training.
    """
    digest, shown = _look_through(folder)
    if not shown:
        return False
    record = trusted if isinstance(trusted, dict) else {}
    if record.get("sha256") != digest:
        raise ConsentError(
            f"the code in {folder} ({shown}) is not what ran when the model was trained",
            hint="restore the files of the run, or use another model",
        )
    _tell(f"{record.get('model')} at {record.get('commit')}, copied to {folder},", shown, emit)
    return True


def _look_through(folder: Path) -> tuple[str, str]:
    """Return a hash of the code in ``folder`` and the names of its files.

    Raises:
        ConsentError: The code of another repository is asked for.
    """
    for reference in _references(folder):
        if "--" in reference:
            raise ConsentError(
                f"{folder} requires code of another repository ({reference}), whose commit is not pinned",
                hint="use another model",
            )
    files = sorted(folder.glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hashlib.sha256(read_whole(file)).hexdigest()}\n".encode())
    return digest.hexdigest(), ", ".join(file.name for file in files)


def _tell(whose: str, shown: str, emit: "EventSink") -> None:
    emit(
        Warned(
            text=f"code of {whose} runs with your permissions, because --trust-remote-code was passed: {shown}"
        )
    )


def copy_code(model: object, source: Path, folder: Path) -> dict[str, object]:
    """Copy the custom code of a ``model`` along with its weights; return its entry for the configuration.

    ``allow_copied_code`` compares the copy with the record of the run; transformers opens it with its ``trust_remote_code``.
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
