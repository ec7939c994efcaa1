"""Progress of a pass over rows."""

from collections.abc import Iterable, Iterator

from sftcli.data.batches.batch import Batch
from sftcli.events import EventSink, Progressed


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
