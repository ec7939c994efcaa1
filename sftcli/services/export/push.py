"""Upload a final model, an adapter or an exported folder to the hub, with its card."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.events import Notice, Session, Warned
from sftcli.modeling.adapter.folder import is_adapter_folder, read_base
from sftcli.modeling.hub.snapshot import Patience
from sftcli.modeling.hub.upload import Upload, upload
from sftcli.modeling.locate.locate import is_path
from sftcli.paths import as_path
from sftcli.services.models.choose import ModelChoice
from sftcli.services.report.model_card import base_of, model_card
from sftcli.services.report.usage import usage_of_folder
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.outcome import newest_finished, require_ended
from sftcli.training.checkpoint.names import step_of
from sftcli.version import __version__

_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_CARD = "README.md"
# What a model is made of. All else in its folder stays here: logs, states of optimizers, notes.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".gguf", ".model", ".tiktoken", ".py", ".md")
_NAMES = ("Modelfile", "LICENSE", "LICENSE.txt", "NOTICE", "merges.txt", "vocab.txt")
_FOLDERS = ("additional_chat_templates",)
_STATES = re.compile(r"(?:optimizer|rng|scheduler)\b.*|(?:state|manifest|trainer_state|events)\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """``model`` is a run, by default the newest finished one, or a folder; it goes to ``name``. ``dry_run`` asks nobody."""

    name: str
    model: str | None
    root: Path
    private: bool = True
    dry_run: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOutcome:
    """What is uploaded: bytes by name in the repository. ``url`` and ``commit`` are "" of a dry run."""

    repo: str
    private: bool
    path: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    url: str = ""
    commit: str = ""
    existed: bool = False


def run_push(request: PushRequest, session: Session, patience: Patience | None = None) -> PushOutcome:
    """Upload the files of a model's folder that make it up, and a card where it has none, in one commit.

    Raises:
        NotFoundError: There is no such run or folder, or no model in it.
        UsageError: It is a checkpoint, or the name is none.
        DataError: A file is a link to another place.
        SftError: See ``upload``.
    """
    if not _NAME.fullmatch(request.name):
        raise UsageError(f"{request.name!r} is no name of a repository", hint="write OWNER/NAME, or NAME")
    choice = _chosen(request)
    files, left_out = _files_of(choice.folder)
    base = base_of(choice)
    texts = {}
    if _CARD not in files:
        usage = usage_of_folder(choice.folder, request.name, base)
        texts[_CARD] = model_card(request.name.rpartition("/")[2], choice, usage)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes |= {name: len(text.encode()) for name, text in texts.items()}
    if left_out:
        session.emit(Notice(text=f"left out, no part of a model: {', '.join(left_out)}"))
    if is_adapter_folder(choice.folder) and is_path(name := read_base(choice.folder).name):
        session.emit(
            Warned(
                text=f"the adapter names its base by a path of this machine, {name}: others need --base-model"
            )
        )
    planned = PushOutcome(
        repo=request.name,
        private=request.private,
        path=str(choice.folder),
        files=dict(sorted(sizes.items())),
        left_out=left_out,
    )
    if request.dry_run:
        return planned
    done = upload(
        Upload(
            repo=request.name,
            files=files,
            texts=texts,
            private=request.private,
            message=request.message or f"Upload by sft {__version__}",
        ),
        session,
        patience or Patience(),
    )
    return replace(
        planned,
        repo=done.repo,
        private=done.private,
        url=done.url,
        commit=done.commit,
        existed=done.existed,
    )


def _chosen(request: PushRequest) -> ModelChoice:
    """Return the folder to upload, and its run where one made it. Neither a base nor a model is looked for."""
    if request.model is None:
        run = newest_finished(request.root)
        return ModelChoice(name=run.name, folder=run.final, run=run)
    for path in (request.root / request.model, as_path(request.model)):
        if (path / "run.json").is_file():
            run = RunFolder(path)
            if not run.is_finished:
                require_ended(run)
                raise NotFoundError(
                    f"run {run.name} has no final model yet",
                    hint=f"finish it, sft resume {run.argument}; or export what it has: sft export {run.argument} --to hf --out DIR",
                )
            return ModelChoice(name=run.name, folder=run.final, run=run)
        if path.is_dir():
            return _of_folder(path, request.model)
    raise NotFoundError(
        f"there is no run or folder called {request.model!r}",
        hint="`sft runs` lists runs; a folder is what sft export wrote",
    )


def _of_folder(path: Path, name: str) -> ModelChoice:
    if (path / "state.json").is_file() and (path / "manifest.json").is_file():
        raise UsageError(
            f"{path} is a checkpoint of step {step_of(path)}, with the state of its optimizer",
            hint=f"export its model first: sft export {path} --to hf --out DIR",
        )
    holds_model = (path / "config.json").is_file() or is_adapter_folder(path) or any(path.glob("*.gguf"))
    if not holds_model:
        raise NotFoundError(f"{path} holds no model", hint="name a run, or a folder that sft export wrote")
    owner = RunFolder(path.absolute().parent)
    run = owner if owner.about.is_file() and owner.final.name == path.name else None
    return ModelChoice(name=name, folder=path, run=run)


def _files_of(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the files of a model by name, and the names of the others.

    Raises:
        DataError: One leads out of the folder.
    """
    found, others = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not _is_of_model(name):
            others.append(name)
        elif not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise DataError(
                f"{path} is a link out of the folder",
                hint=f"put a copy in its place: cp --remove-destination $(readlink -f {path}) {path}",
            )
        else:
            found[name] = path
    return found, tuple(others)


def _is_of_model(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder not in ("", *_FOLDERS) or file.startswith(".") or _STATES.fullmatch(file):
        return False
    return file in _NAMES or file.endswith(_SUFFIXES)
