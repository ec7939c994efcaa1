"""A hub on this machine that takes uploads: the few requests that the hub's client makes for a commit of files."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.serving import answering

TOKEN = "hf_" + "A1b2C3d4E5f6G7h8"


@dataclass
class Repo:
    """A repository: whether it is private, and its files after the newest commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class UploadHub:
    """``blobs`` are large files by content. ``fail`` is part of a path -> status that such a request is answered with."""

    user: str = "me"
    orgs: tuple[str, ...] = ()
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    makes_public: bool = False  # whatever it is asked for

    @property
    def puts(self) -> int:
        return sum(line.startswith("PUT") for line in self.requests)

    @contextmanager
    def serving(self) -> Iterator["UploadHub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        with answering(server) as self.url:
            yield self


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one("GET", b"")

    def do_POST(self) -> None:
        self.handle_one("POST", self.body())

    def do_PUT(self) -> None:
        self.handle_one("PUT", self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_one(self, method: str, body: bytes) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append(f"{method} {path}")
        failing = next((status for part, status in hub.fail.items() if part in f"{method} {path}"), None)
        if failing is not None:
            return self.reply(failing, {"error": "as the test asks"})
        if method == "PUT":
            hub.blobs[path.rpartition("/")[2]] = body
            return self.reply(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        return self.api(path, body)

    def api(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            return self.reply(200, {"type": "user", "name": hub.user, "orgs": []})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name = path.removeprefix("/api/models/").removeprefix("/").removesuffix(".git/info/lfs/objects/batch")
        name = "/".join(name.split("/")[:2])
        if name not in hub.repos:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repo = hub.repos[name]
        if path.endswith("/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": self.mode(one["path"]),
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if "/commit/" in path:
            return self.commit(name, repo, body)
        return self.reply(
            200, {"id": name, "sha": "0" * 40, "private": repo.private, "siblings": [], "tags": []}
        )

    @staticmethod
    def mode(name: str) -> str:
        return "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"

    def create(self, asked: dict[str, object]) -> None:
        owner, name = asked.get("organization") or self.hub.user, asked["name"]
        if owner not in (self.hub.user, *self.hub.orgs):
            return self.reply(403, {"error": f"You don't have the rights to create a model under {owner}"})
        self.hub.repos[f"{owner}/{name}"] = Repo(
            private=not self.hub.makes_public
            and (bool(asked.get("private")) or asked.get("visibility") == "private")
        )
        return self.reply(200, {"url": f"{self.hub.url}/{owner}/{name}", "name": f"{owner}/{name}"})

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            objects.append(one | ({} if one["oid"] in self.hub.blobs else {"actions": upload}))
        self.reply(
            200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
        )

    def commit(self, name: str, repo: Repo, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repo.files[value["path"]] = content
        self.reply(
            200,
            {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}"},
        )

    def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
