"""Progress of a pass over rows, and of several passes that make up one command."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sftcli.data.batches.batch import Batch
from sftcli.events import Event, EventSink, Progressed
from sftcli.runtime import monotonic


def with_progress(batches: Iterable[Batch], emit: EventSink, *, task: str, total: int) -> Iterator[Batch]:
    """Yield ``batches`` and report after each how many of ``total`` rows are done; the task ends even on an error."""
    done = 0
    emit(Progressed(task=task, done=done, total=total))
    try:
        for batch in batches:
            yield batch
            done += len(batch.example_ids)
            if done < total:
                emit(Progressed(task=task, done=done, total=total))
    finally:
        emit(Progressed(task=task, done=total, total=total))


class Stages:
    """The stages of one command, told by number, each with the time of those behind it.

    Stages of one kind take equally long: the second model of an evaluation as long as the first. Of a kind that has not begun
    nothing is known, so there is no estimate before the last kind has begun.
    """

    def __init__(
        self, kinds: Sequence[str], emit: EventSink, get_time: Callable[[], float] = monotonic
    ) -> None:
        self._kinds = tuple(kinds)  # of all stages, in order
        self._emit = emit
        self._get_time = get_time
        self._begun = 0
        self._seconds: dict[str, float] = {}  # of the last stage of a kind

    @contextmanager
    def next(self, name: str) -> Iterator[tuple[str, EventSink]]:
        """Begin the next stage, of the model ``name``; give the name of its task and where its events go."""
        kind, later = self._kinds[self._begun], self._kinds[self._begun + 1 :]
        self._begun += 1
        begin = self._get_time()

        def emit(event: Event, /) -> None:
            if isinstance(event, Progressed):
                known = dict(self._seconds)
                if event.done:
                    known[kind] = (self._get_time() - begin) * event.total / event.done
                is_known = known.keys() >= set(later)
                event = replace(
                    event, later_seconds=sum(known[one] for one in later) if is_known else math.inf
                )
            self._emit(event)

        yield f"{self._begun} of {len(self._kinds)}: {kind} ({name})", emit
        self._seconds[kind] = self._get_time() - begin
