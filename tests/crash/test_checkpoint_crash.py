"""A machine that stops, fills up or fails at any operation of a save or of pruning loses no checkpoint that was announced."""

import errno
import json
import random
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import DataError, NotFoundError, StorageError, UnsavedError
from sftcli.training.checkpoint.format import (
    ADAPTER,
    MANIFEST,
    MODEL,
    manifest_bytes,
    newest_good,
    read_snapshot,
    verify,
)
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.state import TrainingSnapshot, TrainState
from tests.support.faulty_disk import CountingDisk, FailingDisk, KillingDisk, LossyDisk, PowerLost
from tests.support.forked import run_forked
from tests.support.recording import MemoryStore, RecordingSink
from tests.support.training import build_trainer


def snapshot(step: int) -> TrainingSnapshot:
    """A state in which every number tells the step."""
    trainer = build_trainer(
        settings=TrainingSettings(max_steps=1, warmup_steps=0), store=MemoryStore(), emit=RecordingSink()
    )
    tensors = {"a": torch.full((40, 30), float(step)), "b": torch.full((7,), float(step))}
    return TrainingSnapshot(
        state=TrainState(step=step), weights=tensors, optimizer=tensors, rng=trainer.snapshot().rng
    )


SNAPSHOTS = {step: snapshot(step) for step in (1, 2, 3)}


def make_store(root: Path, **changes) -> DirectoryCheckpointStore:
    """Return a store of whole models, or of adapters below a folder that is named after them."""
    name, weights = ("adapter_config.json", ADAPTER) if "adapter" in root.name else ("config.json", MODEL)
    values = {
        "settings": CheckpointSettings(keep_last=1, keep_best=False),
        "write_model_files": lambda folder: storage.write_file(folder / name, [b"{}"]),
        "weights_name": weights,
        "fingerprints": {},
        "pause": lambda seconds: None,
    }
    return DirectoryCheckpointStore(root, **(values | changes))


@pytest.fixture(params=["whole", "adapter"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder with checkpoint 1, of a whole model or an adapter; the next save writes 2 and prunes 1."""
    place = tmp_path / request.param
    make_store(place).save(SNAPSHOTS[1])
    assert (place / "step-00000001" / (ADAPTER if request.param == "adapter" else MODEL)).is_file()
    return place


def holds(root: Path) -> int:
    """Return the step of the checkpoint that a resume would take, after checking what is in it."""
    best = newest_good(root, warn=lambda text: None)
    assert best is not None
    found = read_snapshot(best)
    assert found.state.step == step_of(best)
    for tensors in (found.weights, found.optimizer):
        assert all(
            torch.equal(tensor, torch.full_like(tensor, float(step_of(best)))) for tensor in tensors.values()
        )
    return step_of(best)


def operations_of_a_save(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        make_store(root).save(SNAPSHOTS[2])
    names = [what for what, _ in disk.log]
    assert {"create", "write", "sync", "rename", "unlink", "remove_folder", "make_folder"} == set(names)
    return disk.count


def fresh_copy(root: Path, number: int) -> Path:
    return Path(shutil.copytree(root, root.with_name(f"{root.name}-{number}")))


def test_kill_before_every_operation_of_save_and_prune_leaves_a_whole_checkpoint(
    root, monkeypatch, record_property
):
    total = operations_of_a_save(fresh_copy(root, 0), monkeypatch)
    published = []
    for at in range(1, total + 1):
        copy = fresh_copy(root, at)

        def work(copy=copy, at=at):
            storage.disk = KillingDisk(at)
            make_store(copy).save(SNAPSHOTS[2])

        assert run_forked(work) == -signal.SIGKILL
        published.append(holds(copy))
        make_store(copy).save(SNAPSHOTS[3])  # the next run saves as if nothing had been
        assert holds(copy) == 3
    assert published == sorted(published)  # the old one up to a moment, the new one from then on
    assert set(published) == {1, 2}
    record_property("operations", total)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=["ENOSPC", "EIO", "EACCES"])
def test_error_at_every_operation_of_a_save_leaves_a_whole_checkpoint(root, monkeypatch, number):
    total = operations_of_a_save(fresh_copy(root, 0), monkeypatch)
    for at in range(1, total + 1):
        copy = fresh_copy(root, at)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", FailingDisk(at, number))
            try:
                make_store(copy).save(SNAPSHOTS[2])
                is_saved = True
            except StorageError:
                is_saved = False
        assert holds(copy) == 2 if is_saved else holds(copy) in {1, 2}
        make_store(copy).save(SNAPSHOTS[3])
        assert [path.name for path in copy.iterdir()] == ["step-00000003"]


def test_a_full_disk_before_the_first_checkpoint_is_told_as_one(tmp_path, monkeypatch):
    root = tmp_path / "new" / "checkpoints"
    for at in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", FailingDisk(at, errno.ENOSPC, forever=True))
            with pytest.raises(
                StorageError, match=r"disk full while saving step 1 .* No earlier checkpoint exists"
            ):
                make_store(root).save(SNAPSHOTS[1])


def test_loss_of_power_at_every_operation_leaves_a_whole_checkpoint(root, monkeypatch):
    total = operations_of_a_save(fresh_copy(root, 0), monkeypatch)
    for at in range(1, total + 1):
        copy, disk = fresh_copy(root, at), LossyDisk(at)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            with pytest.raises(PowerLost):
                make_store(copy).save(SNAPSHOTS[2])
        disk.lose_power()
        assert holds(copy) in {1, 2}


def test_kill_at_byte_offsets_of_each_file_leaves_the_old_checkpoint(root):
    sizes = {path.stat().st_size for path in (root / "step-00000001").iterdir()}
    offsets = sorted(
        {offset for size in sizes for offset in (0, 1, 7, 8, size // 2, size - 1)} | {4095, 4096}
    )
    killed = 0
    for number, offset in enumerate(offsets):
        copy = fresh_copy(root, number)

        def work(copy=copy, offset=offset):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, resource.RLIM_INFINITY))
            make_store(copy).save(SNAPSHOTS[2])

        assert run_forked(work) == -signal.SIGXFSZ
        killed += 1
        assert holds(copy) == 1
    assert killed == len(offsets) >= 14


def test_write_that_fails_at_a_byte_offset_is_an_error_with_sizes_and_cleans_up(root):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(
            StorageError, match=r"disk full while saving step 2 to .*need .* free .*Step 1 is intact"
        ):
            make_store(root).save(SNAPSHOTS[2])

    assert run_forked(work) == 0
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def test_passing_fault_is_tried_again_into_a_new_folder(root, monkeypatch):
    pauses = []
    monkeypatch.setattr(storage, "disk", FailingDisk(5, errno.EIO))
    make_store(root, pause=pauses.append).save(SNAPSHOTS[2])
    assert pauses == [0.5]
    assert holds(root) == 2


def test_fault_that_stays_ends_after_three_attempts_with_the_old_checkpoint_named(root, monkeypatch):
    pauses = []
    monkeypatch.setattr(storage, "disk", FailingDisk(5, errno.EIO, forever=True))
    with pytest.raises(UnsavedError, match="Step 1 is intact"):
        make_store(root, pause=pauses.append).save(SNAPSHOTS[2])
    assert pauses == [0.5, 1.0]
    assert holds(root) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
                                  "config.json", MANIFEST])  # fmt: skip
def test_damage_to_any_file_is_found_named_and_the_older_checkpoint_taken(tmp_path, name):
    store = make_store(tmp_path, settings=CheckpointSettings(keep_last=2))
    for step in (1, 2):
        store.save(SNAPSHOTS[step])
    path = tmp_path / "step-00000002" / name
    whole = path.read_bytes()
    random.seed(name)
    for _ in range(20):
        place, bit = random.randrange(len(whole)), random.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        _expect_fallback(tmp_path, path)
    for size in {0, 1, min(8, len(whole) // 2), len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        _expect_fallback(tmp_path, path)
    path.write_bytes(bytes(len(whole)))
    _expect_fallback(tmp_path, path)
    path.unlink()
    _expect_fallback(tmp_path, path)
    path.write_bytes(whole)
    assert holds(tmp_path) == 2


def _expect_fallback(root: Path, path: Path) -> None:
    with pytest.raises((DataError, NotFoundError)):
        verify(path.parent)
    warnings = []
    found = newest_good(root, warn=warnings.append)
    assert found is not None
    assert step_of(found) == 1
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert "resuming from step 1" in warnings[0]


def test_with_no_whole_checkpoint_left_each_fault_is_told(root):
    (root / "step-00000001" / "state.json").unlink()
    with pytest.raises(DataError, match=r"lacks state\.json"):
        newest_good(root, warn=lambda text: None)


def test_manifest_that_leads_out_of_the_folder_is_refused(root):
    manifest = root / "step-00000001" / MANIFEST
    files = json.loads(manifest.read_text())["files"]
    name = "adapter_config.json" if root.name == "adapter" else "config.json"
    files["../x"] = files.pop(name)
    manifest.write_bytes(manifest_bytes(1, files))
    with pytest.raises(DataError, match="outside"):
        verify(root / "step-00000001")


def test_newest_is_the_highest_step_whatever_the_clock_says(tmp_path):
    import os

    store = make_store(tmp_path, settings=CheckpointSettings(keep_last=3))
    for step in (1, 2, 3):
        store.save(SNAPSHOTS[step])
        os.utime(tmp_path / f"step-0000000{step}", (1e9 - step, 1e9 - step))
    assert holds(tmp_path) == 3


def test_best_and_every_nth_and_last_are_kept(tmp_path):
    settings = CheckpointSettings(keep_last=2, keep_every_steps=4)
    store = make_store(tmp_path, settings=settings)
    for step in range(1, 10):
        state = TrainState(step=step, best_step=min(step, 3))
        store.save(replace(SNAPSHOTS[1], state=state))
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 4, 8, 9]


def test_without_settings_for_it_only_the_last_are_kept(tmp_path):
    store = make_store(tmp_path, settings=CheckpointSettings(keep_last=2, keep_best=False))
    for step in range(1, 10):
        store.save(replace(SNAPSHOTS[1], state=TrainState(step=step, best_step=min(step, 3))))
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [8, 9]


def test_nothing_is_deleted_when_the_new_checkpoint_does_not_read_back(root, monkeypatch):
    class RottingDisk(CountingDisk):
        def write(self, file, data):
            super().write(file, bytes(len(data)) if Path(file.name).name == "optimizer.safetensors" else data)

    monkeypatch.setattr(storage, "disk", RottingDisk())
    with pytest.raises(DataError, match=r"optimizer\.safetensors"):
        make_store(root).save(SNAPSHOTS[2])
    assert holds(root) == 1


def test_run_that_was_taken_over_publishes_nothing(root):
    def taken_over() -> None:
        raise StorageError("taken over")

    with pytest.raises(StorageError, match="taken over"):
        make_store(root, check_owner=taken_over).save(SNAPSHOTS[2])
    assert holds(root) == 1
    assert not (root / "step-00000002").exists()
