"""How the processes of one attempt find each other at a store, where an earlier attempt may have left its words.

A launcher that starts them again, with others or fewer, may keep the store, and torchrun's agents do not agree on how often they
have restarted. So the first process names the attempt, and the others follow the name that stands there last.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from sftcli.errors import ResourceError
from sftcli.services.processes.rank import Place

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

PREFIX = "sft"
MEETING_SECONDS = 600  # in which all have to come
# Agents of torchrun have met before they start processes. One that met an agent about to end waits here for a first process that
# does not come, and the new agent for it: only starting it again helps.
HOSTED_MEETING_SECONDS = 300
HOSTED_SECONDS = 60  # to reach a store that a launcher keeps, which was there before the processes were
_ATTEMPT, _MET, _NOTES = "attempt", "met", "notes"  # keys
_POLL_SECONDS = 0.1
_THIS_MACHINE = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The processes of an attempt, once all are here."""

    store: "Store"
    prefix: str  # of the keys of this attempt
    per_machine: int  # as ``machine_size`` returns

    def words(self) -> "Store":
        """Return the part of the store where they leave words for each other."""
        return prefixed(self.prefix, self.store)

    def group(self) -> "Store":
        """Return the part at which the group of torch.distributed meets."""
        return prefixed(f"{self.prefix}/group", self.store)

    def notes(self, place: Place) -> "Store":
        """Return where they leave notes for each other while they save.

        The store of a launcher that is killed is gone with it, and they save once more before they end. So on one machine the first
        process keeps another one.
        """
        words = self.words()
        if not place.is_hosted or place.local_size < place.size:
            return words
        if place.rank == 0:
            store = tcp_store(_THIS_MACHINE, 0, is_master=True, seconds=HOSTED_SECONDS)
            words.set(_NOTES, str(store.port))
            return store
        words.wait([_NOTES], timedelta(seconds=HOSTED_SECONDS))
        return tcp_store(_THIS_MACHINE, int(words.get(_NOTES)), is_master=False, seconds=HOSTED_SECONDS)

    def words_of_thread(self, place: Place) -> "Store":
        """Return what ``words`` does over a connection of its own, which no other thread's wait blocks."""
        store = tcp_store(place.address, place.port, is_master=False, seconds=HOSTED_SECONDS)
        return prefixed(self.prefix, store)


def meet(place: Place) -> Meeting:
    """Wait for all processes of this attempt.

    Raises:
        ResourceError: They do not all come.
    """
    try:
        store = tcp_store(
            place.address,
            place.port,
            place.size,
            is_master=place.rank == 0 and not place.is_hosted,
            seconds=HOSTED_SECONDS if place.is_hosted else MEETING_SECONDS,
        )
        attempt, seats = _call(place, store) if place.rank == 0 else _come(place, store)
    except (dist.DistError, OSError) as error:
        hint = "make sure all were started with the same MASTER_ADDR and MASTER_PORT"
        if place.attempt is None and place.is_hosted:
            hint += (
                "; where nodes of torchrun come and go, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it: "
                "else it sends processes to the store of a node that is gone"
            )
        raise ResourceError(
            f"the {place.size} processes did not all connect to {place.address}:{place.port}: {error}",
            hint=hint,
        ) from error
    return Meeting(store=store, prefix=f"{PREFIX}/{attempt}", per_machine=machine_size(seats))


def _call(place: Place, store: "Store") -> tuple[str, list[tuple[int, int]]]:
    """Name the attempt, wait for all, and say who came; return the name and the seats."""
    attempt = place.attempt or secrets.token_hex(8)
    words = prefixed(f"{PREFIX}/{attempt}", store)
    words.set(_here(0), _card(place))
    store.set(f"{PREFIX}/{_ATTEMPT}", f"{place.size} {attempt}")
    here = [_here(rank) for rank in range(place.size)]
    words.wait(here, timedelta(seconds=_meeting_seconds(place)))
    cards = [card.decode() for card in words.multi_get(here)]
    words.set(_MET, json.dumps(cards))
    return attempt, [_seat(card) for card in cards]


def _come(place: Place, store: "Store") -> tuple[str, list[tuple[int, int]]]:
    """Follow the attempt that is named, until its first process has seen this one."""
    card, announced, attempt = _card(place), "", ""
    seconds = _meeting_seconds(place)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = _text(store, f"{PREFIX}/{_ATTEMPT}")
        size, _, attempt = found.partition(" ")
        if size == str(place.size):  # else it is of an earlier attempt
            words = prefixed(f"{PREFIX}/{attempt}", store)
            if found != announced:
                words.set(_here(place.rank), card)
                announced = found
            cards = json.loads(_text(words, _MET) or "[]")
            if card in cards:  # else those that met are not of this attempt
                return attempt, [_seat(one) for one in cards]
        time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"process 0 did not come within {seconds:g} s")


def _meeting_seconds(place: Place) -> float:
    return HOSTED_MEETING_SECONDS if place.is_hosted else MEETING_SECONDS


def _here(rank: int) -> str:
    return f"here/{rank}"


def _card(place: Place) -> str:
    """Return what a process says when it comes, which no other one says."""
    return f"{place.local_rank} {place.local_size} {secrets.token_hex(8)}"


def _seat(card: str) -> tuple[int, int]:
    local_rank, local_size, _ = card.split()
    return int(local_rank), int(local_size)


def _text(store: "Store", key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def machine_size(seats: Sequence[tuple[int, int]]) -> int:
    """Return how many processes each machine has; 0 where they differ, or have no consecutive ranks.

    ``seats`` are the local rank of each process and the number of those on its machine, by rank.
    """
    _, size = seats[0]
    return size if list(seats) == [(rank % size, size) for rank in range(len(seats))] else 0


def tcp_store(
    address: str, port: int, size: int | None = None, *, is_master: bool, seconds: float
) -> "TCPStore":
    """Return the store at ``address``, which the master opens; an answer may take ``seconds``."""
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(address, port, size, is_master, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def prefixed(prefix: str, store: "Store") -> "Store":
    """Return the part of ``store`` whose keys begin with ``prefix``."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
