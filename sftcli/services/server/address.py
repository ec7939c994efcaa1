"""The name of a running server, as a person types it. Nobody is asked."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from urllib.parse import urlsplit

from sftcli.errors import UsageError

_OLLAMA_PORT = 11434
_URL = re.compile(r"https?://", re.IGNORECASE)
_HINT = "write llama.cpp=http://localhost:8080, vllm=URL, openai=URL or ollama=NAME; openai=URL#MODEL names one of several models"


class ServerKind(StrEnum):
    """The programs that are spoken to; OPENAI is whatever speaks as that service does."""

    LLAMA_CPP = "llama.cpp"
    VLLM = "vllm"
    OPENAI = "openai"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """Where a server is. ``model`` is "" where its only one is meant."""

    kind: ServerKind
    url: str  # without a slash at its end; of ``OPENAI`` with the version, such as /v1
    model: str = ""

    def __str__(self) -> str:
        """Return it as it can be typed."""
        return f"{self.kind}={self.url}" + (f"#{self.model}" if self.model else "")

    @property
    def host(self) -> str:
        """The machine that is named."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_private(self) -> bool:
        """Whether nobody between here and there can read along."""
        return self.url.startswith("https:") or self.is_here


def names_server(text: str) -> bool:
    """Return whether ``text`` is meant as a server, whether or not it is written well."""
    return _URL.match(text) is not None or text.partition("=")[0] in set(ServerKind)


def parse_server(text: str, environ: Mapping[str, str] | None = None) -> ServerAddress:
    """Read ``KIND=URL``, ``ollama=NAME``, or a URL, which is that of a server that speaks as OpenAI's.

    ``#MODEL`` behind a URL names one of several models. Where Ollama runs says ``OLLAMA_HOST`` of ``environ``, by default that of
    this process.

    Raises:
        UsageError: It is no such name, or holds a password.
    """
    name, _, rest = ("openai", "", text) if _URL.match(text) else text.partition("=")
    if name not in set(ServerKind) or not rest:
        raise UsageError(f"{_shown(text)!r} names no server", hint=_HINT)
    kind = ServerKind(name)
    if kind is ServerKind.OLLAMA and not _URL.match(rest):
        return ServerAddress(
            kind=kind, url=_ollama_url(os.environ if environ is None else environ), model=rest
        )
    url, _, model = rest.partition("#")
    address = ServerAddress(kind=kind, url=_url(url, kind), model=model)
    if kind is ServerKind.OLLAMA and not model:
        raise UsageError("ollama needs the name of a model", hint=f"write ollama=NAME, or ollama={url}#NAME")
    return address


def _url(text: str, kind: ServerKind) -> str:
    """Return the URL by which paths are made.

    Raises:
        UsageError: It is none, or it holds more than a place.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UsageError(f"{_shown(text)!r} is no URL", hint=_HINT) from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "the URL of a server holds a name or password, which would stand in files and logs",
            hint="leave it out, and put the key into the environment: OPENAI_API_KEY",
        )
    is_url = _URL.match(text) and parts.hostname and not re.search(r"[\s\x00-\x20\x7f]", text)
    if not is_url or parts.query:
        raise UsageError(f"{_shown(text)!r} is no URL of a server", hint=_HINT)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    place = f"{parts.scheme.lower()}://{host}" + (f":{port}" if port is not None else "")
    path = parts.path.rstrip("/")
    if kind is ServerKind.OPENAI:
        return place + (path or "/v1")
    return place + path.removesuffix("/v1")


def _ollama_url(environ: Mapping[str, str]) -> str:
    named = environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1"
    url = _url(named if _URL.match(named) else f"http://{named}", ServerKind.OLLAMA)
    parts = urlsplit(url)
    if parts.hostname == "0.0.0.0":
        url = url.replace("0.0.0.0", "127.0.0.1", 1)
    return url if parts.port or named.startswith("https:") else f"{url}:{_OLLAMA_PORT}"


def _shown(text: str) -> str:
    return re.sub(r"//[^\s/@]*@", "//***@", text)[:200]
