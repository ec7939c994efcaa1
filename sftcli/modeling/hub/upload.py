"""Upload a folder to the hub as one commit, and say what stood in the way by name."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import (
    ConsentError,
    NetworkError,
    NotFoundError,
    OutputError,
    SftError,
    StoppedError,
    redact,
)
from sftcli.events import Notice, Progressed, Session
from sftcli.modeling.hub.process import endpoint, hub_worker, last_line, next_line, number, offline_by
from sftcli.modeling.hub.snapshot import Patience

_POLL_SECONDS = 0.5
_LOGIN = "run: hf auth login, or set HF_TOKEN; the token needs to be allowed to write"
_AGAIN = "run the same command again: large files that are there already are not sent again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Files and texts by their names in the repository ``repo``: OWNER/NAME, or NAME of the user whose token it is."""

    repo: str
    files: Mapping[str, Path]
    texts: Mapping[str, str]
    private: bool
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """Where they are; ``existed`` tells that the repository was there before."""

    repo: str
    url: str
    commit: str
    existed: bool
    private: bool


def upload(request: Upload, session: Session, patience: Patience) -> Uploaded:
    """Bring the files there.

    Raises:
        ConsentError: There is no token, or it may not write there; or the repository is public, which was not asked for.
        NotFoundError: There is no such owner.
        NetworkError: The hub cannot be reached.
        OutputError: The hub refuses the files.
        StoppedError: A stop was asked for.
    """
    asked = _asked(request)
    deadline = time.monotonic() + patience.start_seconds
    answer: dict[str, object] = {}
    with hub_worker(asked) as (lines, stderr):
        while True:
            line = next_line(lines, _POLL_SECONDS)
            if session.stop.requested():
                raise StoppedError
            match line.get("kind"):
                case None if not answer and time.monotonic() > deadline:
                    raise NetworkError(f"the hub stopped responding ({endpoint()})", hint=_AGAIN)
                case "asking":
                    deadline = time.monotonic() + patience.answer_seconds + patience.file_seconds
                case "answer":
                    answer = line
                    _tell(answer, request, session)
                case "progress":
                    _progress(str(answer["repo"]), number(line, "done"), number(answer, "total"), session)
                case "done":
                    return _uploaded(answer, str(line["commit"]), session)
                case "failed":
                    raise _failure(request.repo, str(line["reason"]), redact(str(line["text"])))
                case "ended":
                    raise NetworkError(f"the upload ended early: {last_line(stderr)}", hint=_AGAIN)


def _asked(request: Upload) -> str:
    if variable := offline_by():
        raise NetworkError(f"the hub was not contacted, because {variable} is set", hint="unset it")
    return json.dumps(
        {
            "repo": request.repo,
            "files": {name: str(path.absolute()) for name, path in request.files.items()},
            "texts": dict(request.texts),
            "private": request.private,
            "message": request.message,
        }
    )


def _tell(answer: Mapping[str, object], request: Upload, session: Session) -> None:
    kind = "private" if answer["private"] else "public"
    what = f"{answer['repo']} exists already and is {kind}: adding a commit"
    if not answer["exists"]:
        what = f"made the {kind} repository {answer['repo']}"
    elif answer["private"] and not request.private:
        what += "; it stays private, its settings on the hub can change that"
    session.emit(Notice(text=what))


def _progress(repo: str, done: int, total: int, session: Session) -> None:
    session.emit(Progressed(task=f"upload {repo}", done=done, total=total, unit="bytes"))


def _uploaded(answer: Mapping[str, object], commit: str, session: Session) -> Uploaded:
    repo, total = str(answer["repo"]), number(answer, "total")
    _progress(repo, total, total, session)
    return Uploaded(
        repo=repo,
        url=f"{endpoint()}/{repo}",
        commit=commit,
        existed=bool(answer["exists"]),
        private=bool(answer["private"]),
    )


def _failure(repo: str, reason: str, text: str) -> SftError:
    match reason:
        case "no-token":
            return ConsentError(f"there is no token for the hub ({endpoint()})", hint=_LOGIN)
        case "unauthorized":
            return ConsentError(f"the hub does not accept the token: {text}", hint=_LOGIN)
        case "gated" | "forbidden":
            return ConsentError(f"the token may not write to {repo}: {text}", hint=_LOGIN)
        case "public":
            return ConsentError(
                f"{text} is public on the hub, so that everybody could read what is uploaded",
                hint="if that is meant: --public; else choose another name",
            )
        case "missing" | "revision":
            return NotFoundError(f"there is no {repo!r} on the hub: {text}", hint="check the owner's name")
        case "storage":
            return OutputError(f"a file cannot be read: {text}", hint=_AGAIN)
        case "refused":
            return OutputError(f"the hub refuses the upload to {repo}: {text}", hint="change what it names")
        case _:
            return NetworkError(f"the hub cannot be reached ({endpoint()}): {text}", hint=_AGAIN)
