"""A model's name, as a person types it, to a local Hugging Face folder with safetensors weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sftcli.errors import (
    ConsentError,
    MismatchError,
    NetworkError,
    NotFoundError,
    SftError,
    UsageError,
)
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.formats.folder_check import (
    CONVERT_HINT,
    UNSAFE_SUFFIXES,
    check_model_folder,
)
from sftcli.modeling.formats.gguf.gguf_import import converted_gguf
from sftcli.modeling.formats.identity import sampled_hash
from sftcli.modeling.formats.pt_import import converted_pt
from sftcli.modeling.hub.process import offline_by
from sftcli.modeling.hub.snapshot import (
    HubSnapshot,
    Patience,
    cached_snapshot,
    fetch_snapshot,
    is_commit,
)
from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME, resolve_alias
from sftcli.paths import as_path
from sftcli.suggest import did_you_mean

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PREFIX = "sha256:"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedModel:
    """A model that is here.

    ``revision`` names the weights for ever: the hub's commit, or ``sha256:`` and a hash. Passed to ``locate_model``
    with the same name it gives the same weights or an error. ``new_tokens``, text -> id, are those that the folder has and the
    model of that name has not.
    """

    folder: Path  # config.json, safetensors; may be read only
    name: str  # as the user wrote it
    how: str  # "the cache (...)", "the hub at 1a2b3c4d", "the folder ..."
    revision: str
    new_tokens: Mapping[str, int] = field(default_factory=dict)


def locate_model(
    name: str,
    *,
    revision: str | None,
    emit: EventSink,
    tokenizer: str | None = None,
    with_code: bool = False,
) -> LocatedModel:
    """Return the folder of the model called ``name``; download or convert it first if needed.

    Args:
        name: The alias, a folder, a .gguf or .pt file, or OWNER/NAME on the hub. What exists as a path is a path.
        revision: A branch, tag or commit of the hub, or the ``revision`` of an earlier ``LocatedModel``.
        tokenizer: Folder or hub name of the tokenizer of a .pt file, which holds none; no other model takes it.
        emit: Gets one line that says where the model is from, and one before each slow step.
        with_code: Fetch the Python files of a hub model too.

    Raises:
        NotFoundError: There is no such model, here or on the hub.
        UsageError: The name means something that cannot be trained, or ``revision`` does not apply to it.
        ConsentError: The weights are pickle files, or the hub wants a login.
        NetworkError: What is needed is not here and cannot be fetched.
        MismatchError: The weights are no longer those of ``revision``.
        DataError: A file is damaged.
    """
    name = name.strip()
    check_name(name, revision=revision, tokenizer=tokenizer)
    located = _locate(name, revision, emit, tokenizer=tokenizer, with_code=with_code)
    emit(Notice(text=f"model {located.name}: from {located.how}"))
    return located


def check_name(name: str, *, revision: str | None = None, tokenizer: str | None = None) -> None:
    """Raise what ``locate_model`` would raise of what its arguments name; nothing is converted, and nobody is asked.

    Raises:
        NotFoundError, UsageError, ConsentError, DataError: As ``locate_model``.
    """
    name = name.strip()
    path = as_path(name)
    if tokenizer is not None and not _is_pt_file(name):
        raise UsageError(
            f"--tokenizer is for .pt files only, and {name} has its own",
            hint="leave --tokenizer out",
        )
    if name == ALIAS:
        return
    if is_path(name):
        if revision is not None and not revision.startswith(_PREFIX):
            raise UsageError(f"a revision ({revision}) applies to hub models, and {name} is a path")
        if path.is_dir():
            check_model_folder(path)
        elif path.suffix != ".gguf" and not _is_pt_file(name):
            raise _not_a_model(path)
    elif not _HUB_NAME.fullmatch(name) or path.suffix == ".gguf":
        raise NotFoundError(
            f"there is no file, folder or model called {name!r}", hint=_nearest(path) or _kinds()
        )
    elif path.parent.is_dir() and (near := _nearest(path)):
        raise NotFoundError(f"{name} is not a folder or file", hint=near)


def known_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model if it is here already; nobody is asked and nothing is made."""
    if is_path(name):
        path = as_path(name)
        return path if path.is_dir() else None
    repo = HUB_NAME if name == ALIAS else name
    if not _HUB_NAME.fullmatch(repo):
        return None
    cached = cached_snapshot(repo, revision if is_commit(revision) else None)
    return None if cached is None else cached.folder


def is_path(name: str) -> bool:
    """Return whether ``locate_model`` takes ``name`` as a folder or a file."""
    return name != ALIAS and as_path(name).exists()


def _locate(
    name: str, revision: str | None, emit: EventSink, *, tokenizer: str | None, with_code: bool
) -> LocatedModel:
    if name == ALIAS:
        if revision is None or revision.startswith(_PREFIX):
            found = resolve_alias(emit, revision=revision)
            return LocatedModel(folder=found.folder, name=name, how=found.how, revision=found.revision)
        return _from_hub(HUB_NAME, name, revision, emit, with_code=with_code)
    if is_path(name):
        return _from_path(as_path(name), name, revision, tokenizer, emit)
    return _from_hub(name, name, revision, emit, with_code=with_code)


def _from_path(
    path: Path, name: str, revision: str | None, tokenizer: str | None, emit: EventSink
) -> LocatedModel:
    if path.is_dir():
        located = LocatedModel(folder=path, name=name, how=f"the folder {path}", revision=sampled_hash(path))
    else:
        folder, digest = (
            converted_pt(path, tokenizer=tokenizer, emit=emit)
            if path.suffix == ".pt"
            else converted_gguf(path, prefix="gguf", emit=emit)
        )
        located = LocatedModel(
            folder=folder, name=name, how=f"{path} by way of {folder}", revision=_PREFIX + digest
        )
    if revision not in (None, located.revision):
        raise MismatchError(
            f"the weights of {name} have changed: they were {revision}, now they are {located.revision}",
            hint="restore the old weights, or start a new run",
        )
    return located


def _is_pt_file(name: str) -> bool:
    path = as_path(name)
    return path.suffix == ".pt" and path.is_file()


def _not_a_model(path: Path) -> SftError:
    if path.suffix in UNSAFE_SUFFIXES:
        return ConsentError(
            f"{path} is a pickle file, which can run code when opened; refused",
            hint=CONVERT_HINT,
        )
    if path.suffix == ".safetensors" or path.name == "config.json":
        return UsageError(f"{path} is one file of a model", hint=f"name its folder: {path.parent}")
    return UsageError(f"{path} is not a model", hint=_kinds())


def _from_hub(
    repo: str, name: str, revision: str | None, emit: EventSink, *, with_code: bool
) -> LocatedModel:
    cached = _complete(cached_snapshot(repo, revision), with_code=with_code)
    if cached is not None and (revision is None or is_commit(revision) or offline_by()):
        return _hub_model(cached, name, f"the hub's cache, {repo} at {cached.commit[:8]}")
    try:
        snapshot = fetch_snapshot(repo, revision=revision, emit=emit, patience=Patience(), code=with_code)
    except NotFoundError as error:
        near = did_you_mean(name.rpartition("/")[2].lower(), [ALIAS, HUB_NAME.rpartition("/")[2].lower()])
        raise NotFoundError(error.message, hint=f"{near} {error.hint}".strip()) from error
    except NetworkError as error:
        if cached is None:
            raise
        emit(
            Warned(
                text=f"{error.message}; {repo} is taken from the cache, as last downloaded for {revision!r}"
            )
        )
        return _hub_model(cached, name, f"the hub's cache, {repo} at {cached.commit[:8]}")
    check_model_folder(snapshot.folder)
    return _hub_model(snapshot, name, f"the hub, {repo} at {snapshot.commit[:8]}")


def _hub_model(snapshot: HubSnapshot, name: str, how: str) -> LocatedModel:
    return LocatedModel(folder=snapshot.folder, name=name, how=how, revision=snapshot.commit)


def _complete(snapshot: HubSnapshot | None, *, with_code: bool) -> HubSnapshot | None:
    if snapshot is None or (with_code and not any(snapshot.folder.glob("*.py"))):
        return None
    try:
        check_model_folder(snapshot.folder)
    except SftError:
        return None  # an interrupted download; fetching it again completes it
    return snapshot


def _nearest(path: Path) -> str:
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return did_you_mean(path.name, [ALIAS])
    prefix = "" if path.parent == Path() else f"{path.parent}/"
    return did_you_mean(str(path), [ALIAS, *(prefix + entry for entry in beside)])


def _kinds() -> str:
    return f"a model is {ALIAS}, a folder, a .gguf file, or OWNER/NAME on the hub; `sft runs` lists runs"
