"""A sign of life of each process at the store, for trainings of several machines: one that vanishes closes no connection.

The others are then inside an exchange that nothing interrupts, so a thread ends them. Silence is counted in own beats and not by
a clock: a job that was suspended and continued as a whole has lost nobody.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

import torch.distributed as dist

from sftcli.errors import ResourceError
from sftcli.services.processes.failures import describe_failure, lost_peer

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 5.0
SILENT_BEATS = 12  # of others, after which a process is taken for lost
GRACE_BEATS = 6  # that a process has to end by itself once another one has failed
FAILURE = "failure"  # key of the store: why the first process that failed did


class Pulse:
    """Beats while the block runs. ``tell`` hears why this process is ended, if it is.

    Args:
        words: The part of the store that all processes of the attempt share, over a connection of its own.
        rank: Of this process; the first one watches the others, which watch the store.
        size: The number of processes.
        tell: Shows a text.
        end: Ends the process at once with an exit code.
    """

    def __init__(
        self,
        words: "Store",
        *,
        rank: int,
        size: int,
        tell: Callable[[str], None],
        end: Callable[[int], object] = os._exit,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._words, self._rank, self._size = words, rank, size
        self._tell, self._end, self._beat_seconds = tell, end, beat_seconds
        self._over = Event()
        self._unanswered = 0  # own beats since the store has answered
        self._silence = dict.fromkeys(range(1, size), 0)  # own beats since that process has beaten
        self._heard: dict[int, bytes] = {}
        self._failed = 0  # own beats since another process has failed, or ended and its store with it

    def __enter__(self) -> "Pulse":
        # Two threads, as an answer of a machine that is gone is waited for without end.
        for work in (self._beat, self._watch):
            Thread(target=work, name="pulse", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(self._beat_seconds):
            count += 1
            try:
                self._words.set(_key(self._rank), str(count))
                has_failed = self._words.check([FAILURE])
                if self._rank == 0:
                    self._listen()
            except dist.DistError:
                has_failed = True
            self._failed = self._failed + 1 if has_failed else 0
            self._unanswered = 0

    def _listen(self) -> None:
        for rank in self._silence:
            key = _key(rank)
            beat = self._words.get(key) if self._words.check([key]) else b""
            self._silence[rank] = self._silence[rank] + 1 if beat == self._heard.get(rank, b"") else 0
            self._heard[rank] = beat

    def _watch(self) -> None:
        while not self._over.wait(self._beat_seconds):
            self._unanswered += 1
            error = self._loss()
            if error is not None:
                self._tell(f"{error.message}. {error.hint}")
                self._end(error.exit_code)
                return

    def _loss(self) -> ResourceError | None:
        """Return why this process has to end, if it has."""
        if self._unanswered > SILENT_BEATS:
            return lost_peer(
                f"nothing was heard of the first of {self._size} processes for {self._seconds} s"
            )
        silent = [rank for rank, beats in self._silence.items() if beats >= SILENT_BEATS]
        if self._rank == 0 and silent:
            error = lost_peer(
                f"nothing was heard of process {silent[0]} of {self._size} for {self._seconds} s"
            )
            with suppress(dist.DistError):
                self._words.compare_set(FAILURE, "", describe_failure(error, rank=silent[0]))
            return error
        if self._failed > GRACE_BEATS:
            return lost_peer(f"another one of {self._size} processes failed, and this one could not end")
        return None

    @property
    def _seconds(self) -> int:
        return round(SILENT_BEATS * self._beat_seconds)


def _key(rank: int) -> str:
    return f"beat/{rank}"
