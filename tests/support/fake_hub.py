"""A hub on this machine that serves one folder, or says nothing at all, and counts what it is asked."""

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.serving import answering

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class FakeHub:
    """``requests`` holds each path that was asked for. ``status`` other than 200 answers every request with it.

    ``folder`` is the newest state, at ``commit``; ``earlier`` has those of other commits. The next ``cuts`` bodies of the
    weights end in the middle, and the next ``busy`` requests for a file are answered with 503. ``ranges`` holds from which
    byte on a file was asked for.
    """

    def __init__(self, repo: str, folder: Path, *, status: int = 200, error_code: str = "") -> None:
        self.repo, self.folder, self.status, self.error_code = repo, folder, status, error_code
        self.commit, self.earlier = COMMIT, dict[str, Path]()
        self.cuts = self.busy = 0
        self.ranges: list[int] = []
        self.requests: list[str] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        with answering(server) as self.url:
            yield self


@contextmanager
def silent_server() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=32) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append(self.path)
        named = [commit for commit in hub.earlier if f"/{commit}" in path]
        commit = named[0] if named else hub.commit
        folder = hub.earlier.get(commit, hub.folder)
        file = folder / path.rpartition("/")[2]
        if hub.status != 200:
            self.reply(hub.status, b"{}", {"X-Error-Code": hub.error_code}, with_body=with_body)
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            self.reply(200, json.dumps(_tree(folder)).encode(), {}, with_body=with_body)
        elif path.startswith(f"/api/models/{hub.repo}"):
            names = [{"rfilename": file["path"], "size": file["size"]} for file in _tree(folder)]
            info = {
                "id": hub.repo,
                "sha": commit,
                "siblings": names,
                "gated": False,
                "private": False,
                "tags": [],
            }
            self.reply(200, json.dumps(info).encode(), {}, with_body=with_body)
        elif f"/{hub.repo}/resolve/" in path and hub.busy and with_body:
            hub.busy -= 1
            self.reply(503, b"{}", {"Retry-After": "0"}, with_body=with_body)
        elif f"/{hub.repo}/resolve/" in path and file.is_file():
            content = file.read_bytes()
            headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit}
            self.reply_file(content, headers, is_cut=file.suffix == ".safetensors", with_body=with_body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

    def reply_file(self, content: bytes, headers: dict[str, str], *, is_cut: bool, with_body: bool) -> None:
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = content[begin:]
        if begin:
            headers |= {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        if with_body:
            self.hub.ranges.append(begin)
        sent = rest
        if is_cut and with_body and self.hub.cuts:
            self.hub.cuts -= 1
            sent = rest[: len(rest) // 2]
        status, length = 206 if begin else 200, {"Content-Length": str(len(rest))}
        self.reply(status, sent, headers | length, with_body=with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _blob(file.read_bytes())}
        for file in sorted(folder.iterdir())
    ]


def _blob(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
