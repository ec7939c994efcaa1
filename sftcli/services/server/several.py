"""Several requests at once: servers read the prompts of many users together, and one that waits in line costs nothing."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

from sftcli.errors import StoppedError
from sftcli.events import StopFlag

Answer = TypeVar("Answer")

AT_ONCE = 4  # requests that are under way


def ask_several(
    ask: Callable[[int], Answer], count: int, stop: StopFlag, *, at_once: int = AT_ONCE
) -> Iterator[tuple[int, Answer]]:
    """Yield each number below ``count`` with what ``ask`` says of it, as answers come. Once ``stop`` is set no other is begun.

    Raises:
        Exception: What ``ask`` raised; answers that came before it have been yielded.
    """
    line = _Line(ask, count, stop)
    running = min(at_once, count)
    for _ in range(running):
        Thread(
            target=line.work, daemon=True
        ).start()  # it ends with the program: a second Ctrl-C waits for no server
    failure = None
    try:
        while running:
            answer = line.answers.get()
            if answer is None:
                running -= 1
            elif isinstance(answer, BaseException):
                failure = failure or answer
            else:
                yield answer
    finally:
        line.is_over.set()
    if failure is not None:
        raise failure


class _Line(Generic[Answer]):
    """What waits to be asked, and the answers; each thread says None when it has done its part."""

    def __init__(self, ask: Callable[[int], Answer], count: int, stop: StopFlag) -> None:
        self._ask, self._stop = ask, stop
        self._numbers: SimpleQueue[int] = SimpleQueue()
        for number in range(count):
            self._numbers.put(number)
        self.answers: SimpleQueue[tuple[int, Answer] | BaseException | None] = SimpleQueue()
        self.is_over = Event()

    def work(self) -> None:
        """Ask until nothing waits, or the line is over."""
        with suppress(Empty, StoppedError):
            while not (self.is_over.is_set() or self._stop.requested()):
                number = self._numbers.get_nowait()
                try:
                    self.answers.put((number, self._ask(number)))
                except StoppedError:
                    raise
                except BaseException as error:  # noqa: BLE001 - it is raised where the answers are taken
                    self.is_over.set()
                    self.answers.put(error)
        self.answers.put(None)
