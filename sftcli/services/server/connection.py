"""Requests to a server: JSON in, a checked form out, within limits of time, size and tries.

What a server sends is foreign: it is read to a limit, it has to be whole, and it is known by the form that it must have.
"""

import json
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPMessage
from typing import IO, TypeVar
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from sftcli.errors import (
    ConsentError,
    DataError,
    NetworkError,
    NotFoundError,
    SftError,
    StoppedError,
    redact,
)
from sftcli.events import EventSink, Notice, StopFlag, Warned
from sftcli.own_files import FormError, as_form
from sftcli.services.server.address import ServerAddress, ServerKind
from sftcli.version import __version__

Form = TypeVar("Form")

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_BYTES = 16 << 20  # of one response
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_CHUNK_BYTES = 64 << 10
_SHOWN_CHARS = 300  # of what a server says
_SLICE_SECONDS = 0.1  # between two looks at the stop flag


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server is waited for, and how often it is asked again."""

    tries: int = 6
    first_wait: float = 1.0  # seconds, twice as long each time
    longest_wait: float = 60.0
    silence_seconds: float = 300.0  # until the next byte: an answer comes when all of it is there
    request_seconds: float = 900.0  # of one try


class RefusedError(DataError):
    """The server will not have this request, or withholds its answer; ``question`` is its number where it is one of several."""

    question: int | None = None


class _TryAgainError(Exception):
    """A try that failed in a way that may pass; ``seconds`` is what the server asks to wait."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class _NoRedirects(HTTPRedirectHandler):
    """Prompts and the key go where the user said and nowhere else."""

    def redirect_request(
        self,
        req: Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Follow none."""


class Connection:
    """A server as one that answers requests; usable from several threads."""

    def __init__(
        self,
        address: ServerAddress,
        emit: EventSink,
        stop: StopFlag,
        patience: Patience | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self.stop = stop
        self._emit = emit
        self._patience = patience or Patience()
        self._opener = _opener(address)
        self._key = self._find_key(os.environ if environ is None else environ)

    def get(self, path: str, form: type[Form]) -> Form:
        """Return what ``path`` says; see ``post``."""
        return self._ask(path, None, form)

    def post(self, path: str, body: Mapping[str, object], form: type[Form]) -> Form:
        """Return the answer to ``body``, tried again where that may help.

        Raises:
            NetworkError: The server cannot be reached, or fails each time.
            RefusedError: It refuses the request.
            ConsentError: It asks for another key.
            NotFoundError: It has no such path or model.
            DataError: What it answers is no such form.
            StoppedError: A stop was asked for while waiting.
        """
        return self._ask(path, json.dumps(body).encode(), form)

    def _ask(self, path: str, body: bytes | None, form: type[Form]) -> Form:
        wait = self._patience.first_wait
        for left in reversed(range(self._patience.tries)):
            try:
                return self._once(path, body, form)
            except _TryAgainError as error:
                if not left:
                    raise NetworkError(
                        f"{self.address} failed {self._patience.tries} times, at last: {error}",
                        hint="see its log; the same command goes on where it stopped",
                    ) from error
                seconds = min(error.seconds or wait * random.uniform(0.5, 1), self._patience.longest_wait)
                self._emit(Notice(text=f"{self.address}: {error}; asking again in {seconds:.1f} s"))
                self._sleep(seconds)
                wait *= 2
        raise AssertionError

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.stop.requested():
                raise StoppedError
            time.sleep(min(left, _SLICE_SECONDS))

    def _once(self, path: str, body: bytes | None, form: type[Form]) -> Form:
        content = self._content(path, body)
        try:
            value = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # a body that was cut, or nested without end
            raise _TryAgainError(f"{path} answers what is no whole JSON") from error
        try:
            answer: Form = as_form(value, form)
        except FormError as error:
            raise DataError(
                f"{self.address} answers {path} in a form that is not known: {error}",
                hint="is the URL that of such a server? see `sft generate --help`",
            ) from error
        return answer

    def _content(self, path: str, body: bytes | None) -> bytes:
        """Return the body of the response, all of it."""
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"sft/{__version__}",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(f"{self.address.url}{path}", data=body, headers=headers)
        end = time.monotonic() + self._patience.request_seconds
        try:
            with self._opener.open(request, timeout=self._patience.silence_seconds) as response:
                return self._read(response, path, end)
        except HTTPError as error:
            with error:
                raise self._failure(error, path) from None
        except (OSError, HTTPException, ValueError) as error:
            raise _TryAgainError(_cause(error)) from error

    def _read(self, response: "IO[bytes]", path: str, end: float) -> bytes:
        found = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
            found += chunk
            if len(found) > MAX_BYTES:
                raise DataError(
                    f"{self.address} answers {path} with more than {MAX_BYTES >> 20} MB, which are not read"
                )
            if time.monotonic() > end:
                raise _TryAgainError(f"{path} takes more than {self._patience.request_seconds:.0f} s")
        told = response.headers.get("Content-Length")  # type: ignore[attr-defined]
        if told is not None and told.isdecimal() and int(told) != len(found):
            raise _TryAgainError(f"{path} was cut after {len(found)} of {told} bytes")
        return bytes(found)

    def _failure(self, error: HTTPError, path: str) -> Exception:
        """Return what to raise for a status that is no success."""
        says = _said(error)
        told = f"{self.address} answers {path} with {error.code}" + (f": {says}" if says else "")
        # A server that cannot tell log-probabilities may say so as if it were broken.
        if error.code in _AGAIN and "logprobs" not in says:
            return _TryAgainError(f"{path} answers {error.code}", _retry_after(error.headers))
        return _of_status(error.code, told, error.headers.get("Location", ""))

    def _find_key(self, environ: Mapping[str, str]) -> str:
        """Return the key that goes with each request; "" where there is none, or it could be read on the way."""
        key = environ.get(KEY_VARIABLE, "").strip()
        if not key or self.address.kind is ServerKind.OLLAMA:
            return ""
        if not key.isascii() or not key.isprintable():
            raise ConsentError(
                f"{KEY_VARIABLE} holds what is no key: more than letters, digits and signs",
                hint="set it anew, without line ends",
            )
        if not self.address.is_private:
            self._emit(
                Warned(
                    text=f"{KEY_VARIABLE} is not sent to {self.address.host}: it could be read on the way (http)"
                )
            )
            return ""
        return key


def _opener(address: ServerAddress) -> OpenerDirector:
    """Return what opens URLs: by the proxies of the environment, but not to this machine."""
    return build_opener(_NoRedirects, *([ProxyHandler({})] if address.is_here else []))


def _of_status(code: int, told: str, leads_to: str) -> SftError:
    if code in {401, 403}:
        return ConsentError(told, hint=f"put a key for it into the environment: {KEY_VARIABLE}")
    if code in {404, 405, 501}:
        return NotFoundError(told, hint="is that its kind, URL and model? openai=URL#MODEL names a model")
    if 300 <= code < 400:
        return NetworkError(
            f"{told}, and sends on to {redact(leads_to)[:_SHOWN_CHARS]}", hint="name that URL, if it is meant"
        )
    return RefusedError(told)


def _retry_after(headers: Message) -> float | None:
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*", headers.get("Retry-After") or "")
    return float(found[1]) if found else None


def _said(error: HTTPError) -> str:
    """Return in a line what the server says of its failure."""
    try:
        text = error.read(_CHUNK_BYTES).decode("utf-8", "replace")
    except (OSError, HTTPException, ValueError):
        return ""
    line = " ".join(_message_in(text).split())
    return redact(line)[:_SHOWN_CHARS]


def _message_in(text: str, depth: int = 2) -> str:
    """Return the message of an error; Ollama's holds that of another server as JSON in a text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, str):
        return json.dumps(content)
    return _message_in(content, depth - 1) if depth else content


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "it does not answer in time"
    if isinstance(reason, ConnectionRefusedError):
        return "nothing listens there"
    return f"the connection broke ({redact(str(reason).strip() or type(reason).__name__)[:_SHOWN_CHARS]})"
