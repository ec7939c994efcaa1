"""Servers for tests: one of their own in a thread of this process, and programs of others."""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

START_SECONDS = 300  # that a program has to answer


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[str]:
    """Yield the URL under which ``server`` answers inside of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def running(
    command: Sequence[object], *, answers_at: str, log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield the URL of a server, ``command`` with ``--port``, once it answers at the path; it runs beside its ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*map(str, command), "--port", str(port)]
    with log.open("w") as lines:
        server = subprocess.Popen(words, cwd=log.parent, stdout=lines, stderr=lines, env=environ)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _answers(f"{url}{answers_at}"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(words)} does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        server.kill()
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False
