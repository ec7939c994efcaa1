"""Several requests at once: servers read the prompts of many users together, and one that waits in line costs nothing."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event as ThreadEvent
from threading import Thread, get_ident
from typing import Generic, TypeVar

from sftcli.errors import StoppedError
from sftcli.events import Event, EventSink, StopFlag

Answer = TypeVar("Answer")

AT_ONCE = 4  # requests that are under way
_TELL_SECONDS = 0.2


class KeptEvents:
    """A sink that keeps what other threads say until the one that made it tells it: views take events of one thread."""

    def __init__(self, emit: EventSink) -> None:
        self._emit, self._owner = emit, get_ident()
        self._kept: SimpleQueue[Event] = SimpleQueue()

    def __call__(self, event: Event, /) -> None:
        """Hand ``event`` on, at once or later."""
        if get_ident() == self._owner:
            self._emit(event)
        else:
            self._kept.put(event)

    def tell(self) -> None:
        """Hand on what was kept."""
        with suppress(Empty):
            while True:
                self._emit(self._kept.get_nowait())


def ask_several(
    ask: Callable[[int], Answer],
    count: int,
    stop: StopFlag,
    *,
    tell: Callable[[], None] = lambda: None,
    at_once: int = AT_ONCE,
) -> Iterator[tuple[int, Answer]]:
    """Yield each number below ``count`` with what ``ask`` says of it, as answers come. Once ``stop`` is set no other is begun.

    ``tell`` is called now and then, here and not where ``ask`` is.

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
            answer = line.next(tell)
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
        self.is_over = ThreadEvent()

    def next(self, tell: Callable[[], None]) -> tuple[int, Answer] | BaseException | None:
        """Wait for what a thread says."""
        while True:
            try:
                answer = self.answers.get(timeout=_TELL_SECONDS)
            except Empty:
                tell()
            else:
                tell()
                return answer

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
