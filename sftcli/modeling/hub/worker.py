"""Download a hub repository or upload one in a separate process, so that the caller can end it at any moment.

Run by path with one JSON argument: ``{"repo", "revision", "weights", "code", "cache"}`` downloads, ``{"repo", "files", "texts",
"private", "message"}`` uploads. Imports nothing of this package. Writes JSON lines: ``asking`` (the process has started), ``answer``
(the hub knows the repository, or the user), ``progress``, ``again`` (a try failed, the next one begins), then ``done`` or ``failed``.
A token never appears in them.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Result = TypeVar("Result")

_TRIES = 3
_LONGEST_PAUSE = 20.0  # seconds; whoever waits for this process gives up a little later
_BUSY = (408, 429, 500, 502, 503, 504)
_CARD = "README.md"  # names the license
_LARGE = 1_000_000  # bytes; smaller files go with the commit
_INDEX = "model.safetensors.index.json"
_DENIED = {401: "unauthorized", 403: "forbidden", 404: "missing"}
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken")


def wanted_files(names: list[str], *, weights: bool, code: bool = False) -> list[str]:
    """Return the files of a repository that a model folder needs: configuration, tokenizer, safetensors; code if asked."""
    top = [name for name in names if "/" not in name or name.startswith("additional_chat_templates/")]
    text = [name for name in top if name.endswith(_TEXT) and not name.endswith(".bin.index.json")]
    text += [name for name in top if name == _CARD]
    if code:
        text += [name for name in top if name.endswith(".py")]
    if not weights:
        return [name for name in text if name != _INDEX]
    shards = [name for name in top if name.startswith("model") and name.endswith(".safetensors")]
    if _INDEX in names:
        return text + [name for name in shards if "-of-" in name]
    return text + [name for name in shards if name == "model.safetensors"]


def main(request: dict[str, object]) -> None:
    """Answer one request on standard output."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    repo, revision = str(request["repo"]), request.get("revision")
    name = revision if isinstance(revision, str) else None
    try:
        if "files" in request:
            _upload(request)
            return
        cache, code = Path(str(request["cache"])), bool(request["code"])
        _download(repo, name, cache, weights=bool(request["weights"]), code=code)
    except Exception as error:  # noqa: BLE001 - the parent decides what each kind means
        reason = _upload_reason(error) if "files" in request else _reason(error)
        _say(kind="failed", reason=reason, text=_first_line(error))


def _download(repo: str, revision: str | None, cache: Path, *, weights: bool, code: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    info = _model_info(repo, revision)
    siblings = info.siblings or []
    names = [file.rfilename for file in siblings]
    files = wanted_files(names, weights=weights, code=code)
    if weights and not any(name.endswith(".safetensors") for name in files):
        unsafe = any(name.endswith(_UNSAFE) for name in names)
        _say(kind="failed", reason="unsafe" if unsafe else "no-weights", text="")
        return
    if info.gated:
        _check_access(repo, revision, files[0])
    _say(kind="answer", total=sum(file.size or 0 for file in siblings if file.rfilename in files))
    folder_name = repo_folder_name(repo_id=repo, repo_type="model")
    threading.Thread(target=_report_growth, args=(cache / folder_name / "blobs",), daemon=True).start()
    # The library goes on in the middle of a file when a connection breaks; what it gives up on starts over here, without
    # the files that are whole.
    folder = _patiently(
        lambda: snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=files),
        may_repeat=lambda error: _reason(error) == "unreachable",
    )
    _say(kind="done", folder=folder)


def _upload(request: dict[str, Any]) -> None:
    """Bring files to a repository in one commit: until then nothing of them is seen there.

    The hub keeps large files by their content. What an upload that was broken off has brought is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        _say(kind="failed", reason="no-token", text="")
        return
    api = HfApi()
    _say(kind="asking")
    name, user = str(request["repo"]), str(api.whoami()["name"])
    repo = name if "/" in name else f"{user}/{name}"
    known = _known(repo)
    is_new, is_private = known is None, bool(request["private"])
    if known is None:
        api.create_repo(repo, private=is_private)
        known = api.model_info(repo, timeout=10)
    if is_private and not known.private:
        _say(kind="failed", reason="public", text=repo)
        return
    sizes = {name: Path(path).stat().st_size for name, path in request["files"].items()}
    _say(kind="answer", repo=repo, exists=not is_new, private=bool(known.private), total=sum(sizes.values()))
    additions = [CommitOperationAdd(name, path) for name, path in request["files"].items()]
    additions += [CommitOperationAdd(name, text.encode()) for name, text in request["texts"].items()]
    done = 0
    for addition in additions:
        if sizes.get(addition.path_in_repo, 0) >= _LARGE:
            api.preupload_lfs_files(repo, [addition])
            done += sizes[addition.path_in_repo]
            _say(kind="progress", done=done)
    commit = api.create_commit(repo, additions, commit_message=str(request["message"]))
    _say(kind="done", commit=commit.oid)


def _known(repo: str) -> "ModelInfo | None":
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().model_info(repo, timeout=10)
    except RepositoryNotFoundError:
        return None


def _model_info(repo: str, revision: str | None) -> "ModelInfo":
    from huggingface_hub import HfApi

    _say(kind="asking")  # all that takes long to import is here
    return _patiently(
        lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10),
        may_repeat=lambda error: _status(error) in _BUSY,
    )


def _patiently(work: Callable[[], Result], *, may_repeat: Callable[[Exception], bool]) -> Result:
    """Return what ``work`` returns; where it fails in a way that may pass, wait and try again, a few times."""
    for attempt in range(1, _TRIES):
        try:
            return work()
        except Exception as error:
            if not may_repeat(error):
                raise
            _say(kind="again", text=_first_line(error))
            time.sleep(_pause(error, attempt))
    return work()


def _pause(error: Exception, attempt: int) -> float:
    response = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdigit() else 2.0 ** (attempt - 1)


def _check_access(repo: str, revision: str | None, file: str) -> None:
    """Raise for a gated repository before anything else: otherwise the fault only shows inside the download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=10)


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "missing"
    if status in (401, 403):
        return "gated"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return "storage"
    return "unreachable"


def _upload_reason(error: Exception) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file
        error = error.__cause__
    status = _status(error)
    if status in _DENIED:
        return _DENIED[status]
    return "refused" if 400 <= status < 500 and status not in _BUSY else _reason(error)


def _status(error: Exception) -> int:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _report_growth(blobs: Path) -> None:
    before = last = _size(blobs)
    while True:
        time.sleep(0.5)
        size = _size(blobs)
        if size != last:
            last = size
            _say(kind="progress", done=max(size - before, 0))


def _size(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed when it was complete
            continue
    return total


def _say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
