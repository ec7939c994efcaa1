"""A checkpoint that several processes write in parts is whole or absent, whatever becomes of one of them."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.errors import DataError, NotFoundError, ReportedByPeerError, StorageError, UnsavedError
from sftcli.training.checkpoint import together
from sftcli.training.checkpoint.format import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    manifest_bytes,
    newest_good,
    read_snapshot,
    verify,
)
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.checkpoint.together import Leader, PartStore
from sftcli.training.random_streams import capture_rng
from sftcli.training.state import Part, TrainingSnapshot, TrainState
from tests.support.faulty_disk import CountingDisk
from tests.support.forked import end_forked, start_forked
from tests.support.saving import FolderNotes

PARTS = 2
OTHERS = ("model-00002-of-00002.safetensors", "optimizer-00002-of-00002.safetensors")


def snapshot(step: int, rank: int) -> TrainingSnapshot:
    """The part of a process of a state in which every number tells the step."""
    tensors = {f"{name}{rank}": torch.full((40, 30), float(step)) for name in "ab"}
    return TrainingSnapshot(
        state=TrainState(step=step), weights=tensors, optimizer=tensors, rng=capture_rng(), peers=(capture_rng(),),
        part=Part(number=rank, of=PARTS),
    )  # fmt: skip


def stores(root: Path) -> tuple[DirectoryCheckpointStore, PartStore]:
    """Return the stores of the first process and of the other one."""
    notes = FolderNotes(root.with_name(f"{root.name}-notes"))
    shutil.rmtree(notes.folder, ignore_errors=True)
    notes.folder.mkdir(parents=True)
    first = DirectoryCheckpointStore(
        root,
        settings=CheckpointSettings(keep_last=1, keep_best=False),
        write_model_files=lambda folder: storage.write_file(folder / "config.json", [b"{}"]),
        fingerprints={},
        pause=lambda seconds: None,
        others=Leader(notes, processes=PARTS),
    )
    return first, PartStore(root, notes, rank=1, weights_name=MODEL)


def save(root: Path, step: int) -> list[object]:
    """Save in two threads; return what came out in each: a path or an error."""

    def outcome(rank: int) -> object:
        try:
            return made[rank].save(snapshot(step, rank))
        except Exception as error:  # noqa: BLE001 - it is what came out
            return error

    made = stores(root)
    with ThreadPoolExecutor(PARTS) as threads:
        return list(threads.map(outcome, range(PARTS)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder with checkpoint 1; the next save writes 2 and prunes 1."""
    place = tmp_path / "run"
    assert save(place, 1) == [str(place / "step-00000001")] * PARTS
    return place


def holds(root: Path) -> int:
    """Return the step of the checkpoint that a resume would take, after checking what is in it."""
    best = newest_good(root, warn=lambda text: None)
    assert best is not None
    found = read_snapshot(best)
    for tensors in (found.weights, found.optimizer):
        assert sorted(tensors) == ["a0", "a1", "b0", "b1"]
        assert all(torch.equal(one, torch.full_like(one, float(step_of(best)))) for one in tensors.values())
    return step_of(best)


def test_parts_are_one_checkpoint_in_the_layout_of_the_hub(root):
    folder = root / "step-00000001"
    assert holds(root) == 1
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {number: f"model-0000{number + 1}-of-00002.safetensors" for number in range(PARTS)}
    assert places == {f"{name}{number}": file for name in "ab" for number, file in files.items()}
    assert json.loads((folder / MANIFEST).read_text())["format"] == 2


class DiskOfOther(CountingDisk):
    """Fails with ``number``, or kills the process, at operation ``at`` on the files of the second process."""

    def __init__(self, at: int, number: int = 0) -> None:
        super().__init__()
        self.at, self.number = at, number
        self.own = 0

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        self.own += Path(str(path)).name in OTHERS
        if self.own == self.at and Path(str(path)).name in OTHERS:
            if not self.number:
                raise MemoryError("a bug")
            raise OSError(self.number, "as it was told", str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["ENOSPC", "EACCES"])
def test_disk_that_fails_one_process_is_the_same_error_in_all_and_leaves_nothing(root, monkeypatch, number):
    for at in range(1, 7):  # create, write (the header and the tensors) and sync the weights
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", DiskOfOther(at, number))
            first, other = save(root, 2)
        assert type(first) is type(other) is (StorageError if number == errno.ENOSPC else UnsavedError)
        assert str(first) == str(other)
        assert "Step 1 is intact" in str(first)
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
    assert save(root, 2) == [str(root / "step-00000002")] * PARTS
    assert holds(root) == 2


def test_fault_of_one_process_that_passes_is_tried_again_by_all(root, monkeypatch):
    monkeypatch.setattr(storage, "disk", DiskOfOther(3, errno.EIO))
    assert save(root, 2) == [str(root / "step-00000002")] * PARTS
    assert holds(root) == 2


def test_what_is_no_fault_of_a_disk_is_raised_where_it_came_from_and_nothing_is_saved(root, monkeypatch):
    monkeypatch.setattr(storage, "disk", DiskOfOther(2))
    first, other = save(root, 2)
    assert isinstance(other, MemoryError)
    assert isinstance(first, StorageError)
    assert "process 1: MemoryError: a bug" in str(first)
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def test_byte_that_one_process_reads_back_otherwise_is_an_error_in_all(root, monkeypatch):
    class Flipping(CountingDisk):
        def sync(self, path: Path) -> None:
            super().sync(path)
            if path.name == OTHERS[1]:
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)

    monkeypatch.setattr(storage, "disk", Flipping())
    first, other = save(root, 2)
    assert "does not read back as it was written" in str(first) == str(other)
    assert holds(root) == 1


@pytest.mark.parametrize("rank", range(PARTS))
def test_kill_of_either_process_at_any_operation_leaves_a_whole_checkpoint(root, monkeypatch, rank):
    """Two forked processes; the notes of a killed one never come, and the other hears of its end."""
    monkeypatch.setattr(together, "_LATER_SECONDS", 0.02)
    published = []
    at, died = 0, True
    while died:
        at += 1
        copy = Path(shutil.copytree(root, root.with_name(f"copy-{at}")))
        codes = run_two(copy, killed=rank, at=at)
        died = codes[rank] == -signal.SIGKILL
        published.append(holds(copy))
        assert save(copy, 3) == [str(copy / "step-00000003")] * PARTS
        assert holds(copy) == 3
    assert at > 8
    assert codes == [0, 0]
    assert published == sorted(published)
    assert published[-1] == 2


def run_two(root: Path, *, killed: int, at: int) -> list[int]:
    """Save step 2 in two processes, of which one is killed before operation ``at``; return how they ended."""
    made, over = stores(root), root.with_name(f"{root.name}-over")

    class Watched(FolderNotes):
        def find(self, name: str) -> str | None:
            if (text := super().find(name)) is None and over.exists():
                raise ReportedByPeerError(71)
            return text

    def work(rank: int) -> Callable[[], object]:
        def run() -> None:
            from tests.support.faulty_disk import KillingDisk

            store = made[rank]
            notes = Watched(root.with_name(f"{root.name}-notes"))
            if isinstance(store, DirectoryCheckpointStore):
                store.others = Leader(notes, processes=PARTS)
            else:
                made_of = PartStore(root, notes, rank=rank, weights_name=MODEL)
                store = made_of
            storage.disk = KillingDisk(at) if rank == killed else storage.disk
            store.save(snapshot(2, rank))

        return run

    children = [start_forked(work(rank)) for rank in range(PARTS)]
    codes = {killed: end_forked(children[killed])}
    if codes[killed]:
        over.touch()
    codes[1 - killed] = end_forked(children[1 - killed])
    return [codes[rank] for rank in range(PARTS)]


def _without(name: str) -> Callable[[dict[str, object]], object]:
    return lambda files: files.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        _without(OTHERS[0]),
        _without(OTHERS[1]),
        _without("model.safetensors.index.json"),
        lambda files: files.update({MODEL: files[OTHERS[0]]}),
        lambda files: files.update({OPTIMIZER: files[OTHERS[0]]}),
        lambda files: files.update({"model-00003-of-00003.safetensors": files[OTHERS[0]]}),
        lambda files: files.update({"adapter_model.safetensors": files[OTHERS[0]]}),
    ],
)
def test_manifest_that_does_not_list_all_parts_and_no_others_is_refused(root, change):
    folder = root / "step-00000001"
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    for parts in (1, 2, 3, 10**12):
        (folder / MANIFEST).write_bytes(manifest_bytes(1, manifest["files"], parts=parts))
        with pytest.raises(DataError, match="does not list all files"):
            verify(folder)


@pytest.mark.parametrize("name", [*OTHERS, "model.safetensors.index.json"])
def test_part_that_is_missing_cut_changed_or_of_another_step_is_found_and_the_older_one_taken(root, name):
    aside = Path(shutil.copytree(root, root.with_name("older")))
    save(root, 2)
    shutil.copytree(aside / "step-00000001", root / "step-00000001")
    path = root / "step-00000002" / name
    good = path.read_bytes()
    of_another_step = (root / "step-00000001" / name).read_bytes()
    faults = [good[:-1], good[:-1] + bytes([good[-1] ^ 1])]
    faults += [of_another_step] if of_another_step != good else []
    for content in faults:
        path.write_bytes(content)
        warned: list[str] = []
        best = newest_good(root, warn=warned.append)
        assert best is not None
        assert step_of(best) == 1
        assert name in warned[0]
    path.unlink()
    with pytest.raises(NotFoundError, match=name):
        verify(root / "step-00000002")


def test_processes_that_verify_together_look_at_every_file(root):
    for name in (*OTHERS, "model-00001-of-00002.safetensors", "rng.safetensors"):
        path = root / "step-00000001" / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        found = 0
        for number in range(3):
            try:
                verify(root / "step-00000001", part=Part(number=number, of=3))
            except DataError:
                found += 1
        assert found == 1
        path.write_bytes(good)


def test_tensor_in_two_parts_is_refused(root):
    folder = root / "step-00000001"
    (folder / OTHERS[0]).write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(DataError, match="a0, which another part holds"):
        read_snapshot(folder, is_verified=True)


def test_whole_state_of_parts_is_that_of_all_processes(root):
    found = read_snapshot(list_checkpoints(root)[0])
    assert replace(found, weights={}, optimizer={}).part == Part()
    assert found.state.step == 1
    assert len(found.peers) == 1
