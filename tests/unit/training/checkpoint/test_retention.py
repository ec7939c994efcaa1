"""Which checkpoints stay, over any sequence of saves, and that none goes before the new one has been read back."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.storage import Disk
from sftcli.training.checkpoint.format import verify
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.state import TrainState
from tests.crash.test_checkpoint_crash import SNAPSHOTS, make_store

# Of each save: steps since the one before, and whether its held-out loss was the lowest up to then.
SAVES = st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=8)


class WatchfulDisk(Disk):
    """Looks, whenever a checkpoint loses its name, whether the newest one is whole."""

    removed = 0

    def sync(self, path: Path) -> None:
        """Cost nothing: no power is lost here."""

    def rename(self, source: Path, target: Path) -> None:
        if storage.scratch_label(target.name, storage.TRASH) is not None:
            newest = list_checkpoints(source.parent)[-1]
            assert source != newest
            verify(newest)
            WatchfulDisk.removed += 1
        super().rename(source, target)


def save_all(root: Path, kept: CheckpointSettings, saves: list[tuple[int, bool]]) -> None:
    store = make_store(root, settings=kept)
    step = best = 0
    steps: list[int] = []
    bests: list[int] = []
    for gap, is_best in saves:
        step += gap
        best = step if is_best else best
        store.save(replace(SNAPSHOTS[1], state=TrainState(step=step, best_step=best)))
        steps.append(step)
        bests += [step] if is_best else []
        every = kept.keep_every_steps
        expected = {*steps[-kept.keep_last :], *(s for s in steps if every and s % every == 0)}
        expected |= set(bests[-1:]) if kept.keep_best else set()
        assert {step_of(path) for path in list_checkpoints(root)} == expected
        assert all(path.name.startswith("step-") for path in root.iterdir())


@settings(max_examples=40, deadline=None)
@given(saves=SAVES, last=st.integers(1, 3), best=st.booleans(), every=st.integers(0, 4))
def test_after_any_saves_the_last_the_best_and_every_nth_stay_and_nothing_else(saves, last, best, every):
    kept = CheckpointSettings(keep_last=last, keep_best=best, keep_every_steps=every)
    root, old = Path(tempfile.mkdtemp()), storage.disk
    storage.disk = WatchfulDisk()
    try:
        save_all(root, kept, saves)
    finally:
        storage.disk = old
        shutil.rmtree(root)


def test_the_law_above_has_seen_removals():
    root, old = Path(tempfile.mkdtemp()), storage.disk
    storage.disk = WatchfulDisk()
    before = WatchfulDisk.removed
    try:
        save_all(root, CheckpointSettings(keep_last=1, keep_best=False), [(1, False)] * 3)
    finally:
        storage.disk = old
        shutil.rmtree(root)
    assert WatchfulDisk.removed == before + 2
