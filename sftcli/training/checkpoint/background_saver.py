"""Saves that do not make steps wait for a disk, announced only when durable."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

from sftcli import storage
from sftcli.environment import is_scheduled
from sftcli.errors import UnsavedError
from sftcli.events import CheckpointSaved, EventSink, Progressed, Warned
from sftcli.runtime import Clock, monotonic, step_aside

SIGN_SECONDS = 1.0  # between signs that a save is waited for
SLOW_SECONDS = 25.0  # schedulers wait about 30 s between SIGTERM and SIGKILL


class Saver:
    """Runs one save at a time, on a thread if requested, and emits ``CheckpointSaved`` once it has returned.

    Faults and events come on the caller's thread. One save in a row may fail for a reason that may pass.
    """

    def __init__(self, emit: EventSink, clock: Clock) -> None:
        self.emit = emit
        self.clock = clock
        self.saved_step = -1  # of the last durable snapshot
        self._has_failed = False  # the last one
        self._is_slow_told = False
        self._thread: Thread | None = None
        self._result: CheckpointSaved | BaseException | None = None
        self._is_awaited = Event()

    def begin(self, step: int, save: Callable[[], str]) -> None:
        """Start ``save`` on a thread, after the one before."""
        self.finish(wait=True)
        self._is_awaited.clear()
        # A daemon: who quits at once does not wait, and a half-written checkpoint is ignored like that of a kill.
        name = f"waiting for the checkpoint of step {step}"  # also what is shown where it is waited for
        self._thread = Thread(target=self._run_aside, args=(step, save), name=name, daemon=True)
        self._thread.start()

    def save_now(self, step: int, save: Callable[[], str], *, is_last: bool) -> None:
        """Save here and now, after the one before; a fault of the last one is always raised."""
        self.finish(wait=True)
        self._run(step, save)
        self._tell(is_last=is_last)

    def finish(self, *, wait: bool, at_most: float | None = None) -> None:
        """Report the outcome of the pending save, if it has ended; ``wait`` for it, but not for longer than ``at_most`` seconds."""
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._wait(self._thread, at_most)
            has_ended = not self._thread.is_alive()
            self._thread = None
            if has_ended:
                self._tell(is_last=False)

    def _wait(self, thread: Thread, at_most: float | None) -> None:
        """Wait for ``thread`` with a sign that moves: a slow disk takes minutes."""
        self._is_awaited.set()
        is_shown, end = False, None if at_most is None else monotonic() + at_most
        thread.join(SIGN_SECONDS)
        while thread.is_alive() and (end is None or monotonic() < end):
            self.emit(Progressed(task=thread.name, done=0, total=0))
            is_shown = True
            thread.join(SIGN_SECONDS)
        if is_shown:
            self.emit(Progressed(task=thread.name, done=1, total=1))

    def _run_aside(self, step: int, save: Callable[[], str]) -> None:
        """Run ``save``, its heavy work on a thread of the lowest priority for as long as nobody waits for it.

        No user may raise a priority again, so a thread that has the lowest one must not be waited for: other programs
        that keep all cores busy would let it stand still.
        """
        with ThreadPoolExecutor(1, initializer=step_aside) as lowest:

            def work(piece: Callable[[], object]) -> None:
                piece() if self._is_awaited.is_set() else lowest.submit(piece).result()

            with storage.heavy_work_by(work):
                self._run(step, save)

    def _run(self, step: int, save: Callable[[], str]) -> None:
        begin = self.clock()
        try:
            path = save()
        except Exception as error:  # noqa: BLE001 - raised again by ``_tell``
            self._result = error
        else:
            self._result = CheckpointSaved(step=step, path=path, seconds=self.clock() - begin)

    def _tell(self, *, is_last: bool) -> None:
        result, self._result = self._result, None
        if isinstance(result, UnsavedError) and not (self._has_failed or is_last):
            self._has_failed = True
            self.emit(Warned(text=f"{result.message}; training continues and saves again when next due"))
        elif isinstance(result, BaseException):
            raise result
        elif result is not None:
            self.saved_step, self._has_failed = result.step, False
            self.emit(result)
            if result.seconds > SLOW_SECONDS and not self._is_slow_told and is_scheduled(os.environ):
                self._is_slow_told = True
                self.emit(
                    Warned(
                        text=f"saving took {result.seconds:.0f} s: a scheduler that kills 30 s after SIGTERM would cut the "
                        "last save off; let it send SIGUSR1 earlier (Slurm: --signal=USR1@120)"
                    )
                )
