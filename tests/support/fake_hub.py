"""A hub on this machine that serves one folder, or says nothing at all, and counts what it is asked."""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class FakeHub:
    """``requests`` holds each path that was asked for. ``status`` other than 200 answers every request with it."""

    def __init__(self, repo: str, folder: Path, *, status: int = 200, error_code: str = "") -> None:
        self.repo, self.folder, self.status, self.error_code = repo, folder, status, error_code
        self.requests: list[str] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


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
        file = hub.folder / path.rpartition("/")[2]
        if hub.status != 200:
            self.reply(hub.status, b"{}", {"X-Error-Code": hub.error_code}, with_body=with_body)
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            self.reply(200, json.dumps(_tree(hub.folder)).encode(), {}, with_body=with_body)
        elif path.startswith(f"/api/models/{hub.repo}"):
            names = [{"rfilename": file["path"], "size": file["size"]} for file in _tree(hub.folder)]
            info = {
                "id": hub.repo,
                "sha": COMMIT,
                "siblings": names,
                "gated": False,
                "private": False,
                "tags": [],
            }
            self.reply(200, json.dumps(info).encode(), {}, with_body=with_body)
        elif f"/{hub.repo}/resolve/" in path and file.is_file():
            content = file.read_bytes()
            headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": COMMIT}
            self.reply(200, content, headers, with_body=with_body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
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
