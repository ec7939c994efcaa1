"""Which rows of earlier runs are replayed: never one that a run held out, as many as asked, the same for the same seed."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.data.example import Example
from sftcli.data.prepared.about import AboutRows
from sftcli.data.prepared.store import HELDOUT, TRAIN, PreparedDataset, PreparedWriter
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError
from sftcli.services.train.earlier.rows import draw, replayable

# So few different rows that runs have many of them in common.
ROWS = st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple), max_size=12)
RUNS = st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=3)


def stored(folder: Path, train: list[tuple[int, ...]], heldout: list[tuple[int, ...]]) -> PreparedDataset:
    with PreparedWriter(folder) as writer:
        for split, rows in ((TRAIN, train), (HELDOUT, heldout)):
            for line, ids in enumerate(rows, start=1):
                mask = np.arange(len(ids)) > 0
                writer.add(
                    split,
                    Example(
                        input_ids=np.array(ids, dtype=np.int32),
                        loss_mask=mask,
                        origin=Origin(path="rows.jsonl", line=line),
                    ),
                )
        return writer.finish(AboutRows(audit={}))


@settings(max_examples=60, deadline=None)
@given(runs=RUNS, own=ROWS, count=st.integers(1, 30), seed=st.integers(0, 9))
def test_what_is_replayed_was_held_out_by_no_run(runs, own, count, seed):
    with TemporaryDirectory() as folder:
        tables = {f"run-{n}": stored(Path(folder, str(n)), *rows) for n, rows in enumerate(runs)}
        trained = {run: found.train for run, found in tables.items()}
        held = [stored(Path(folder, "own"), [], own).heldout, *(found.heldout for found in tables.values())]
        pools = replayable(trained, held, max_tokens=3)
        forbidden = {*own, *(row for _, heldout in runs for row in heldout)}
        rows = {run: [tuple(trained[run][index].input_ids) for index in pool] for run, pool in pools.items()}
        allowed = {row for train, _ in runs for row in train if row not in forbidden and len(row) <= 3}
        pooled = [row for found in rows.values() for row in found]
        assert set(pooled) == allowed  # all that may be replayed can be
        assert len(pooled) == len(allowed)  # each row once, whichever runs have it
        if not allowed:
            with pytest.raises(DataError, match="no rows to replay"):
                draw(pools, count, seed=seed)
            return
        drawn = draw(pools, count, seed=seed)
        assert drawn == draw(pools, count, seed=seed)
        sizes = {run: len(found) for run, found in drawn.items()}
        assert sum(sizes.values()) == count
        assert max(sizes.values()) - min(sizes.values()) <= 1  # of each run as many
        for run, found in drawn.items():
            assert set(found) <= set(pools[run])
            times = Counter(found).values()
            assert max(times, default=0) <= -(-len(found) // len(pools[run]))  # none oftener than it must


def test_another_seed_draws_other_rows():
    pools = {"first": list(range(100))}
    assert draw(pools, 20, seed=0) != draw(pools, 20, seed=1)
