"""Rendering in processes of its own, where rows are many and cores are enough; rows come back in their order.

Reading, counting and storing stay in the command's own process. Each worker is a fresh interpreter that is given batches
through a pipe and answers through another, in turn: what comes out does not depend on how many there are. It lives in a
session of its own, so that a signal for the command reaches the command alone, and ends when its pipe does, however the
command ends.

One process keeps two cores busy already: the tokenizer works beside the rest, in threads. So workers begin at
``FEWEST_CORES``, and only after ``ALONE_CHARS`` of text were rendered without them: a worker costs a second to start.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, Self, cast

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.rendering.render import Row, num_chars, rare_collections
from sftcli.errors import DataError, ResourceError, SftError, StoppedError
from sftcli.events import StopFlag
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.services.prepare.rendering import BatchRenderer, RenderedBatch, RenderOrder
from sftcli.services.prepare.wire import framed, from_bytes, pack, read_framed, to_bytes, unpack
from sftcli.services.processes.rank import cpu_count, find_place

FEWEST_CORES = 4
MOST_WORKERS = 8
ALONE_CHARS = 8_000_000
BATCHES_AHEAD = 3  # that each worker has been given
_PIPE_BYTES = 1 << 20
_DONE, _FAILED = b"+", b"-"  # what an answer begins with
_START = """
import json, sys
if line := sys.stdin.buffer.readline():  # else the command ended before it had said what there is to do
    sys.path[:] = json.loads(line)
    from sftcli.services.prepare.workers import serve
    serve()
"""
_THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def worker_count() -> int:
    """Return how many workers this process may have: its share of the cores, less one for itself; 0 where they are few."""
    place = find_place(os.environ)
    cores = cpu_count() // (place.local_size if place else 1)
    return min(cores - 1, MOST_WORKERS) if cores >= FEWEST_CORES and sys.executable else 0


class RenderWorkers:
    """Renders batches, with up to ``count`` workers; a context manager, behind which none is left.

    Args:
        tokenizer: What this process renders with.
        order: How everybody renders.
        count: Workers; 0 for none.
        stop: Set where the user asked for an end, which is why a worker may have died.
    """

    def __init__(
        self,
        tokenizer: HFChatTokenizer,
        order: RenderOrder,
        *,
        count: int,
        stop: StopFlag,
    ) -> None:
        self._own = BatchRenderer(tokenizer, order)
        self._fingerprint, self._order = tokenizer.fingerprint, order
        self._count, self._stop = count, stop
        self._chars_left = ALONE_CHARS
        self._workers: list[subprocess.Popen[bytes]] = []

    def render(self, batches: Iterable[Sequence[Row]]) -> Iterator[RenderedBatch]:
        """Yield what becomes of each batch, in order.

        Raises:
            ResourceError: A worker was killed.
        """
        batches = iter(batches)
        yield from self._own.render_all(self._few(batches))
        sent = received = 0
        for rows in batches:
            self._start()
            self._send(sent, rows)
            sent += 1
            if sent - received >= BATCHES_AHEAD * self._count:
                yield self._receive(received)
                received += 1
        while received < sent:
            yield self._receive(received)
            received += 1

    def _few(self, batches: Iterator[Sequence[Row]]) -> Iterator[Sequence[Row]]:
        while not self._count or self._chars_left > 0:
            rows = next(batches, None)
            if rows is None:
                return
            self._chars_left -= sum(map(num_chars, rows))
            yield rows

    def _start(self) -> None:
        environ = os.environ | dict.fromkeys(_THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false"}
        while len(self._workers) < self._count:
            worker = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environ,
                start_new_session=True,
            )
            self._workers.append(worker)
            _widen(_pipe(worker.stdout))
            self._write(worker, f"{json.dumps(sys.path)}\n".encode())
            self._write(worker, framed(to_bytes([_plain(self._order), self._fingerprint])))

    def _send(self, number: int, rows: Sequence[Row]) -> None:
        self._write(self._workers[number % self._count], framed(to_bytes(rows)))

    def _write(self, worker: "subprocess.Popen[bytes]", message: bytes) -> None:
        try:
            _pipe(worker.stdin).write(message)
            _pipe(worker.stdin).flush()
        except BrokenPipeError:
            raise self._lost(worker) from None

    def _receive(self, number: int) -> RenderedBatch:
        worker = self._workers[number % self._count]
        try:
            answer = read_framed(_pipe(worker.stdout))
        except EOFError:
            raise self._lost(worker) from None
        if answer[:1] == _FAILED:
            raise _error_of(answer[1:])
        return unpack(answer[1:])

    def _lost(self, worker: "subprocess.Popen[bytes]") -> SftError:
        if self._stop.requested():
            return StoppedError()
        worker.kill()  # where it closed its pipe and lives
        code = worker.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ResourceError(
            f"a process that renders rows {how}; nothing was kept",
            hint="the system does so where memory runs out: end other programs, or give this one fewer cores: taskset -c 0 sft",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                _close(_pipe(pipe))


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # all of them were asked for
    return pipe


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what is left for a worker that is gone
        return


def _widen(pipe: IO[bytes]) -> None:
    """Let a whole batch fit into a pipe, so that a worker goes on while its answer is not yet asked for."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # the user has too many of them: it is slower
            return


def _plain(order: RenderOrder) -> dict[str, object]:
    return asdict(order) | {
        "model_folder": str(order.model_folder),
        "allow_control_tokens": sorted(order.allow_control_tokens),
    }


def serve() -> None:
    """Answer with what becomes of each batch that comes, until none comes."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not get between the answers
    inbox = SimpleQueue[bytes | None]()
    threading.Thread(target=_take_in, args=(source, inbox), daemon=True).start()
    order = inbox.get()
    renderer = None if order is None else _renderer_or_error(order)
    with rare_collections():
        while renderer is not None and (rows := inbox.get()) is not None:
            try:
                sink.write(framed(_answer(renderer, rows)))
                sink.flush()
            except BrokenPipeError:  # the command is gone
                os._exit(1)


def _take_in(source: IO[bytes], inbox: "SimpleQueue[bytes | None]") -> None:
    """Read ahead, so that whoever writes never waits for one who waits for it to read."""
    try:
        while True:
            inbox.put(read_framed(source))
    except EOFError:
        inbox.put(None)


def _renderer_or_error(data: bytes) -> BatchRenderer | Exception:
    values, fingerprint = cast("tuple[dict[str, Any], str]", from_bytes(data))
    values |= {
        "model_folder": Path(values["model_folder"]),
        "allow_control_tokens": frozenset(values["allow_control_tokens"]),
        "train_on": TrainOn(values["train_on"]),
        "thinking": Thinking(values["thinking"]),
    }
    try:
        return _renderer_of(RenderOrder(**values), fingerprint)
    except Exception as error:  # noqa: BLE001 - the command tells it
        return error


def _renderer_of(order: RenderOrder, fingerprint: str) -> BatchRenderer:
    tokenizer = load_chat_tokenizer(order.model_folder, template=order.template, variables=order.variables)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"the tokenizer or the template in {order.model_folder} changed while rows were prepared",
            hint="wait until the file is complete, then run again",
        )
    return BatchRenderer(tokenizer, order)


def _answer(renderer: BatchRenderer | Exception, rows: bytes) -> bytes:
    """Return what becomes of ``rows``, or what went wrong."""
    try:
        if isinstance(renderer, Exception):
            raise renderer
        return _DONE + pack(renderer.render(cast("list[Row]", from_bytes(rows))))
    except SftError as error:
        return _FAILED + to_bytes([type(error).__name__, error.message, error.hint])
    except Exception:  # noqa: BLE001 - the command raises it
        return _FAILED + to_bytes(["", traceback.format_exc(), ""])


def _error_of(data: bytes) -> Exception:
    name, message, hint = cast("tuple[str, str, str]", from_bytes(data))
    kind = next((kind for kind in SftError.__subclasses__() if kind.__name__ == name), None)
    return kind(message, hint=hint) if kind else RuntimeError(message)
