"""Fetch a model repository from the hub into its own cache, without ever waiting on a server that is silent."""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import ConsentError, NetworkError, NotFoundError, OutputError, SftError, redact
from sftcli.events import EventSink, Notice, Progressed
from sftcli.modeling.hub.process import endpoint, hub_worker, last_line, next_line, number, offline_by
from sftcli.paths import as_path

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a server before it counts as unreachable."""

    start_seconds: float = (
        60.0  # until our own process asks; a slow disk or busy machine is no silence of the hub
    )
    answer_seconds: float = 9.0  # from the question to the first answer
    file_seconds: float = (
        30.0  # from the answer to the first byte of a file; 0 counts it in ``answer_seconds``
    )
    stall_seconds: float = 60.0  # between two signs of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSnapshot:
    """A repository at one commit in the hub's cache. The folder is read only for us."""

    folder: Path
    commit: str


def is_commit(revision: str | None) -> bool:
    """Return whether ``revision`` is a full commit, which never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def hub_cache() -> Path:
    """Return the download cache of the hub's own tools."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if chosen := os.environ.get(name):
            return as_path(chosen)
    if home := os.environ.get("HF_HOME"):
        return as_path(home) / "hub"
    return as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def cached_snapshot(repo: str, revision: str | None) -> HubSnapshot | None:
    """Return the cached repository without any request. It may lack files."""
    from huggingface_hub import try_to_load_from_cache

    for probe in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        found = try_to_load_from_cache(repo, probe, cache_dir=hub_cache(), revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            return HubSnapshot(folder=folder, commit=folder.name)
    return None


def fetch_snapshot(
    repo: str,
    *,
    revision: str | None,
    emit: EventSink,
    patience: Patience,
    weights: bool = True,
    code: bool = False,
) -> HubSnapshot:
    """Download the configuration, the tokenizer and, with ``weights``, the safetensors files of ``repo``.

    ``code`` brings its Python files as well; nothing here runs them.

    Raises:
        NetworkError: The hub is not reachable, or went silent for longer than ``patience`` allows.
        NotFoundError: There is no such repository or revision, or it holds no weights.
        ConsentError: Access needs approval or a login, or the weights are pickle files.
        OutputError: The hub's cache is not writable.
    """
    if variable := offline_by():
        raise NetworkError(f"the hub was not contacted, because {variable} is set", hint=_elsewhere(repo))
    asked = {"repo": repo, "revision": revision, "weights": weights, "code": code}
    request = json.dumps({**asked, "cache": str(hub_cache())})
    total = 0
    deadline = time.monotonic() + patience.start_seconds
    with hub_worker(request) as (lines, stderr):
        while True:
            line = next_line(lines, deadline - time.monotonic())
            match line.get("kind"):
                case "asking":
                    deadline = time.monotonic() + patience.answer_seconds
                case "answer":
                    total = number(line, "total")
                    deadline = max(deadline, time.monotonic() + patience.file_seconds)
                    emit(Notice(text=f"downloading {repo} ({total / 1e6:.0f} MB) from the hub, once"))
                case "again":
                    deadline = max(deadline, time.monotonic() + patience.file_seconds)
                    emit(Notice(text=f"{repo}: retrying after {redact(str(line['text']))}"))
                case "progress":
                    deadline = time.monotonic() + patience.stall_seconds
                    done = min(number(line, "done"), total)
                    emit(Progressed(task=f"download {repo}", done=done, total=total, unit="bytes"))
                case "done":
                    emit(Progressed(task=f"download {repo}", done=total, total=total, unit="bytes"))
                    folder = Path(str(line["folder"]))
                    return HubSnapshot(folder=folder, commit=folder.name)
                case "failed":
                    raise _failure(repo, revision, str(line["reason"]), redact(str(line["text"])))
                case "ended":
                    raise NetworkError(f"the download of {repo} ended early: {last_line(stderr)}")
                case _:
                    raise NetworkError(f"the hub stopped responding ({endpoint()})", hint=_elsewhere(repo))


def _failure(repo: str, revision: str | None, reason: str, text: str) -> SftError:
    match reason:
        case "gated":
            return ConsentError(
                f"access to {repo} needs approval or a login",
                hint=f"ask for access at {endpoint()}/{repo}, then run: hf auth login",
            )
        case "missing":
            return NotFoundError(
                f"there is no model {repo!r} on the hub, or it is private",
                hint="check the spelling; for a private model run: hf auth login",
            )
        case "revision":
            return NotFoundError(
                f"{repo} has no revision {revision!r}", hint="use a branch, a tag or a full commit"
            )
        case "unsafe":
            return ConsentError(
                f"{repo} has only pickle weights (.bin, .pt), which can run code when opened",
                hint="use a revision or a model with safetensors weights",
            )
        case "no-weights":
            return NotFoundError(
                f"{repo} has no model.safetensors", hint="name a model that has safetensors weights"
            )
        case "storage":
            return OutputError(
                f"the hub's cache cannot be written: {text}", hint="set HF_HOME to another folder"
            )
        case _:
            return NetworkError(f"the hub cannot be reached ({endpoint()}): {text}", hint=_elsewhere(repo))


def _elsewhere(repo: str) -> str:
    return f"on a connected machine run `hf download {repo} --local-dir FOLDER`, copy FOLDER here, and name the folder"
