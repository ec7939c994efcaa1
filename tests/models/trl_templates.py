"""The chat templates of the package ``trl``: of the installed one, else of a wheel that pip downloads. They are no part of the project."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

_FOLDER = "trl/chat_templates/"
_TRAINING = "_training"


def find_trl_templates(out: Path) -> Path:
    """Return the folder of the installed package, or of one that is downloaded to ``out`` once."""
    spec = importlib.util.find_spec("trl")
    if spec and spec.origin and (folder := Path(spec.origin).parent / "chat_templates").is_dir():
        return folder
    if not list(out.glob("trl-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "trl", "--no-deps", "--quiet", "--dest", str(out)]
        subprocess.run(command, check=True)
    with ZipFile(max(out.glob("trl-*.whl"))) as wheel:
        wheel.extractall(out, [name for name in wheel.namelist() if name.startswith(_FOLDER)])
    return out / _FOLDER


def pairs_of(folder: Path) -> dict[Path, Path | None]:
    """Return the templates of ``folder``, each with its twin for training, where there is one."""
    files = sorted(folder.glob("*.jinja"))
    twins = {file.stem.removesuffix(_TRAINING): file for file in files if file.stem.endswith(_TRAINING)}
    return {file: twins.get(file.stem) for file in files if not file.stem.endswith(_TRAINING)}
