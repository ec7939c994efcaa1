import math
from collections.abc import Iterator

import numpy as np
import pytest

from sftcli.data.batches.batch import Batch, collate
from sftcli.data.batches.progress import Stages, with_progress
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.events import Progressed
from tests.support.recording import RecordingSink


@pytest.fixture
def batches() -> list[Batch]:
    """Two rows and one."""
    row = Example(
        input_ids=np.arange(4, dtype=np.int32),
        loss_mask=np.ones(4, dtype=bool),
        origin=Origin(path="rows.jsonl", line=1),
    )
    return [collate([row] * rows, example_ids=range(rows), pad_id=0) for rows in (2, 1)]


def told(sink: RecordingSink) -> list[tuple[int, int]]:
    return [(event.done, event.total) for event in sink.of(Progressed)]


def test_rows_are_counted_when_their_batch_is_done_and_the_end_is_told_once(batches):
    sink = RecordingSink()
    seen = [
        (len(batch.example_ids), told(sink)[-1])
        for batch in with_progress(batches, sink, task="held-out", total=3)
    ]
    assert seen == [(2, (0, 3)), (1, (2, 3))]
    assert told(sink) == [(0, 3), (2, 3), (3, 3)]


def test_task_is_over_when_it_is_left_or_fails(batches):
    def failing() -> Iterator[Batch]:
        yield batches[0]
        raise OSError

    left = RecordingSink()
    rows = with_progress(batches, left, task="held-out", total=3)
    next(rows)
    rows.close()
    assert told(left) == [(0, 3), (3, 3)]
    failed = RecordingSink()
    with pytest.raises(OSError):  # noqa: PT011 - the one from above
        list(with_progress(failing(), failed, task="held-out", total=3))
    assert told(failed)[-1] == (3, 3)


def test_the_time_of_later_stages_is_known_once_every_kind_of_them_has_begun():
    sink, now = RecordingSink(), [0.0]
    stages = Stages(("scoring", "answering") * 2, sink, get_time=lambda: now[0])
    for seconds in (10.0, 40.0, 8.0, 30.0):
        with stages.next("a model") as (task, emit):
            begin = now[0]
            for done in range(5):
                now[0] = begin + seconds * done / 4
                emit(Progressed(task=task, done=done, total=4))
    assert list(dict.fromkeys(event.task for event in sink.of(Progressed))) == [
        f"{number} of 4: {kind} (a model)"
        for number, kind in ((1, "scoring"), (2, "answering"), (3, "scoring"), (4, "answering"))
    ]
    assert [event.later_seconds for event in sink.of(Progressed)] == [
        *[math.inf] * 5,  # answers are not measured yet
        *[math.inf, 50.0, 50.0, 50.0, 50.0],  # as long as the first model takes, which is measured on the way
        *[40.0] * 5,
        *[0.0] * 5,
    ]
