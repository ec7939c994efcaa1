"""The processes of one training at the level of a command: order of work, messages of rank 0, and a common end.

They meet at a key-value store of torch.distributed. The first process writes and talks; the others follow it. Whichever
process fails leaves a description there before its connections break, so that the first one can show it, once.
"""

import atexit
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist

from sftcli.config.auto import with_values
from sftcli.config.schema.settings import Settings
from sftcli.errors import (
    Location,
    MismatchError,
    ReportedByPeerError,
    ResourceError,
    StoppedError,
    UsageError,
)
from sftcli.events import EventSink, NeverStop, StopFlag, Warned
from sftcli.memory_faults import is_out_of_memory
from sftcli.services.processes.failures import describe_failure, error_of, exit_code_of, lost_peer
from sftcli.services.processes.meeting import Meeting, meet
from sftcli.services.processes.pulse import FAILURE, Pulse
from sftcli.services.processes.rank import Place
from sftcli.training.distributed.group import EXCHANGE_SECONDS, Group

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Result = TypeVar("Result")

OVER = "over"  # key of the store
LOST_SECONDS = 2.0  # in which a launcher says which process it was that died
_POLL_SECONDS = 0.05


class Peers:
    """A single process: rank 0 without others."""

    notes: "PeerNotes | None" = None  # where there are others

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()

    def broadcast(self, value: Mapping[str, object]) -> None:
        """Send ``value``, plain JSON, to all other ranks."""

    def receive(self, stop: StopFlag) -> Mapping[str, object]:
        """Wait for the next message of rank 0.

        Raises:
            StoppedError: ``stop`` was set meanwhile.
            ReportedByPeerError: A process failed.
        """
        raise NotImplementedError

    def rank_zero_first(self, work: Callable[[], Result], stop: StopFlag | None = None) -> Result:
        """Return the result of ``work``, done by rank 0 while the others wait, and then by them."""
        if not self.group.is_writer:
            self.receive(stop or NeverStop())
            return work()
        result = work()
        self.broadcast({})
        return result

    def share(self, work: Callable[[], Mapping[str, object]]) -> Mapping[str, object]:
        """Return the result of ``work`` in rank 0, plain JSON, in every process."""
        if not self.group.is_writer:
            return self.receive(NeverStop())
        result = work()
        self.broadcast(result)
        return result

    def gather(self, part: object, stop: StopFlag) -> list[object]:  # noqa: ARG002
        """Return what each process gave, by rank, once all have: plain as JSON.

        Raises:
            StoppedError, ReportedByPeerError: As ``receive`` does.
        """
        return [part]

    def agree_on(self, found: Mapping[str, str]) -> None:
        """Make sure that all processes have found the same, by name; the first one's counts.

        Raises:
            MismatchError: This one has found something else.
        """
        if self.group.is_writer:
            self.broadcast(found)
            return
        received = self.receive(NeverStop())
        other = [name for name in found if received.get(name) != found[name]]
        if other:
            raise MismatchError(
                f"process {self.group.rank} found a different {other[0]} than process 0",
                hint="make sure all machines read the same files, or copies of them",
            )


class ConnectedPeers(Peers):
    """One of several processes."""

    def __init__(self, group: Group, store: "Store", notes: "Store") -> None:
        super().__init__(group)
        self._store = store
        self.notes = PeerNotes(notes, store, is_writer=group.is_writer)
        self._exchanged = 0  # how many values were exchanged

    def broadcast(self, value: Mapping[str, object]) -> None:
        """Leave ``value`` at the store."""
        self._store.set(self._next_key(), json.dumps(value))

    def receive(self, stop: StopFlag) -> Mapping[str, object]:
        """Wait at the store."""
        return cast("Mapping[str, object]", self._take(self._next_key(), stop))

    def gather(self, part: object, stop: StopFlag) -> list[object]:
        """Leave ``part`` at the store and wait for those of the others."""
        key = self._next_key()
        self._store.set(f"{key}/{self.group.rank}", json.dumps(part))
        return [self._take(f"{key}/{rank}", stop) for rank in range(self.group.size)]

    def _take(self, key: str, stop: StopFlag) -> object:
        while not self._store.check([key]):
            _raise_failure(self._store, is_writer=self.group.is_writer)
            if stop.requested():
                raise StoppedError
            time.sleep(_POLL_SECONDS)
        value: object = json.loads(self._store.get(key))
        return value

    def await_end(self) -> None:
        """Wait until the first process has written, said and done all: a process that ends makes launchers end the rest.

        Raises:
            ReportedByPeerError: It failed on the way.
        """
        with suppress(dist.DistError):  # the store ends with the process that keeps it
            while not self._store.check([OVER]):
                _raise_failure(self._store, is_writer=False)
                time.sleep(_POLL_SECONDS)

    def say_over(self) -> None:
        """Let the others end."""
        with suppress(dist.DistError):
            self._store.set(OVER, "1")

    def end_with(self, error: BaseException) -> BaseException:
        """Report ``error`` to the others and return what this process must raise: rank 0 shows the first error."""
        try:
            found = self._claim(error)
        except dist.DistError:  # the store is gone, and with it the first process or its launcher
            return lost_peer(self._lost()) if is_broken_connection(error) else error
        if found is None:
            is_shown_here = self.group.is_writer or isinstance(error, StoppedError | KeyboardInterrupt)
            return error if is_shown_here else ReportedByPeerError(_code_of(error))
        return error_of(found) if self.group.is_writer else _as_follower(found)

    def _claim(self, error: BaseException) -> str | None:
        """Return None where ``error`` is the first failure of all, else the description of that."""
        if is_broken_connection(error):
            deadline = time.monotonic() + LOST_SECONDS
            while not self._store.check([FAILURE]) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            own = describe_failure(lost_peer(self._lost()), rank=self.group.rank)
            return str(self._store.compare_set(FAILURE, "", own).decode())
        own = describe_failure(error, rank=self.group.rank)
        found = str(self._store.compare_set(FAILURE, "", own).decode())
        return None if found == own else found

    def _lost(self) -> str:
        return f"one of the {self.group.size} processes was killed, or its machine was lost"

    def _next_key(self) -> str:
        self._exchanged += 1
        return f"message/{self._exchanged}"


class PeerNotes:
    """Texts that processes leave for each other from any thread: it asks for what is there, and so blocks no other thread.

    Args:
        store: Has the texts.
        words: Where a process says that it failed.
        is_writer: Whether this is the first process.
    """

    def __init__(self, store: "Store", words: "Store", *, is_writer: bool) -> None:
        self._store = store
        self._words = words
        self._is_writer = is_writer

    def leave(self, name: str, text: str) -> None:
        """Leave ``text``."""
        self._store.set(f"note/{name}", text)

    def find(self, name: str) -> str | None:
        """Return the text of that name once it is there.

        Raises:
            ReportedByPeerError: A process failed; in the first one its error.
        """
        if self._store.check([f"note/{name}"]):
            return str(self._store.get(f"note/{name}").decode())
        with suppress(dist.DistError):  # their store is gone with a launcher that was killed
            _raise_failure(self._words, is_writer=self._is_writer)
        return None


def _raise_failure(store: "Store", *, is_writer: bool) -> None:
    """Raise where a process has left that it failed."""
    if store.check([FAILURE]):
        described = store.get(FAILURE).decode()
        raise error_of(described) if is_writer else _as_follower(described)


def with_processes(settings: Settings, peers: Peers) -> Settings:
    """Return ``settings`` with the number of processes that there are, which a launcher may have decided.

    Raises:
        UsageError: They cannot share rows as ``settings`` ask for.
    """
    count, parts = peers.group.size, settings.training.context_processes
    if count % parts:
        raise UsageError(
            f"training.context_processes is {parts}, and {count} {'process' if count == 1 else 'processes'} cannot be divided by it",
            hint=f"start a multiple of {parts}, such as --processes {parts}, or set training.context_processes=1",
            location=Location(key="training.context_processes"),
        )
    return with_values(settings, {"training.processes": peers.group.size})


def is_broken_connection(error: BaseException) -> bool:
    """Return whether ``error`` is that of a collective whose peer is gone, and not of one that finds no memory."""
    is_exchange = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
    return is_exchange and not is_out_of_memory(error)


@contextmanager
def joined(place: Place | None, emit: EventSink) -> Iterator[Peers]:
    """Meet the other processes, and end together with them; ``emit`` hears why this one is ended in the middle of an exchange.

    Raises:
        ResourceError: They do not all come, one was lost, or there are fewer devices than processes.
        ReportedByPeerError: Another process failed, and the first one says so.
    """
    if place is None:
        yield Peers()
        return
    _take_device(place)
    met = meet(place)
    peers = _connect(place, met)
    if peers.group.is_writer:
        atexit.register(peers.say_over)
    try:
        with _pulse(place, met, emit):
            yield peers
            if not peers.group.is_writer:
                peers.await_end()
    except ReportedByPeerError:
        raise
    except BaseException as error:
        ending = peers.end_with(error)
        if ending is error:
            raise
        raise ending from error
    dist.destroy_process_group()


def _take_device(place: Place) -> None:
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise ResourceError(
                f"{place.local_size} processes were started on a machine with {torch.cuda.device_count()} CUDA devices",
                hint="start one process for each device",
            )
        torch.cuda.set_device(place.local_rank)
    elif torch.backends.mps.is_available():
        raise ResourceError("several processes cannot share the GPU of a Mac", hint="start one process")


def _connect(place: Place, met: Meeting) -> ConnectedPeers:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=met.group(),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=EXCHANGE_SECONDS),
    )
    group = Group(rank=place.rank, size=place.size, per_machine=met.per_machine)
    return ConnectedPeers(group, met.words(), met.notes(place))


def _pulse(place: Place, met: Meeting, emit: EventSink) -> AbstractContextManager[object]:
    """Return what notices that a machine has vanished; on one machine the launcher sees each process end."""
    if place.local_size == place.size:
        return nullcontext()
    return Pulse(
        met.words_of_thread(place),
        rank=place.rank,
        size=place.size,
        tell=lambda text: emit(Warned(text=text)),
    )


def _as_follower(described: str) -> Exception:
    error = error_of(described)
    return error if isinstance(error, StoppedError) else ReportedByPeerError(exit_code_of(described))


def _code_of(error: BaseException) -> int:
    return exit_code_of(describe_failure(error, rank=0))
