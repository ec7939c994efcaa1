"""A loss of power at any operation keeps what was announced; the whole of it is ``make power-loss``."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sftcli import storage
from tests.crash.power_loss import Cuts
from tests.support.bench import CASES
from tests.support.faulty_disk import CountingDisk
from tests.support.forked import run_forked
from tests.support.power import PowerDisk
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

SEEDS, CUTS = range(16), 3
OLD, NEW = b"the old one", b"the new one, which is longer"
Work = Callable[[Path], object]


def make_file(place: Path) -> None:
    storage.make_folders(place / "some" / "folder")
    storage.replace_file(place / "some" / "folder" / "file", NEW)


def make_folder(place: Path) -> None:
    with storage.atomic_folder(place / "some" / "folder", hint="", is_new=True) as fresh:
        storage.write_file(fresh / "file", [NEW])


def make_one_file(place: Path) -> None:
    with storage.whole_file(place / "some" / "folder" / "file", hint="") as fresh:
        storage.disk.let_library_write(fresh.parent, lambda: fresh.write_bytes(NEW))


def forget_the_folder(place: Path) -> None:
    storage.make_folders(place / "some" / "folder")
    storage.write_file(place / "some" / "folder" / "file", [NEW])


def forget_the_content(place: Path) -> None:
    storage.make_folders(place / "some" / "folder")
    with storage.disk.create(place / "some" / "folder" / "file") as file:
        storage.disk.write(file, NEW)
    storage.disk.sync(place / "some" / "folder")


def left_by(work: Work, place: Path, seed: int, *, at: int = 0) -> bytes | None:
    """Return what is left of the file that ``work`` makes: power is lost before operation ``at``, by default behind the last."""
    copy = Path(shutil.copytree(place, place.with_name(f"{place.name}-{at}-{seed}")))

    def cut() -> None:
        storage.disk = disk = PowerDisk(copy, at, seed)
        work(copy)
        disk.lose_power()

    assert run_forked(cut) in {0, -signal.SIGKILL}
    file = copy / "some" / "folder" / "file"
    found = file.read_bytes() if file.exists() else None
    shutil.rmtree(copy)
    return found


@pytest.mark.parametrize("work", [make_file, make_folder, make_one_file])
def test_what_was_written_is_there_after_a_loss_of_power(work, tmp_path):
    (tmp_path / "place").mkdir()
    assert {left_by(work, tmp_path / "place", seed) for seed in SEEDS} == {NEW}


@pytest.mark.parametrize("work", [forget_the_folder, forget_the_content])
def test_what_was_not_synced_can_be_lost(work, tmp_path):
    (tmp_path / "place").mkdir()
    left = {left_by(work, tmp_path / "place", seed) for seed in SEEDS}
    assert len(left) > 1


def test_a_file_that_is_replaced_is_the_old_or_the_new_one_after_any_loss_of_power(tmp_path):
    folder = tmp_path / "place" / "some" / "folder"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(OLD)
    left = {
        left_by(lambda place: storage.replace_file(place / "some" / "folder" / "file", NEW), tmp_path / "place", seed, at=at)
        for at in range(1, 7)
        for seed in SEEDS
    }  # fmt: skip
    assert left == {OLD, NEW}


def test_the_log_is_on_the_disk_before_a_checkpoint_and_the_final_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl", 15)
    build_tiny_model(tmp_path / "model")
    disk = CountingDisk()
    monkeypatch.setattr(storage, "disk", disk)
    changes = (
        "run.name=one",
        "training.max_steps=3",
        "checkpoint.every_steps=1",
        "checkpoint.in_background=false",
    )
    train(settings_of(Path(), Path("model"), *changes), StopAtStep(99))
    is_safe, published = False, 0
    for what, name in disk.log:
        if name == "events.jsonl":
            is_safe = what == "sync"
        elif what == "rename" and ("-tmp-step-" in name or name == "new"):  # a checkpoint, or the final model
            assert is_safe
            published += 1
    assert is_safe
    assert published == 4


SLOW = [pytest.param(case.name, marks=pytest.mark.slow) for case in CASES if case.name != "train"]


@pytest.mark.parametrize("name", ["train", *SLOW])
def test_the_same_command_goes_on_after_a_loss_of_power(name, machine):
    (case,) = [case for case in CASES if case.name == name]
    bench, chance = Cuts(machine), random.Random(name)
    bench.measure(case)
    faults = [bench.cut(case, chance.randint(1, len(bench.logs[name])), seed) for seed in range(CUTS)]
    assert not any(faults), "\n".join(faults)
    assert bench.counts.total() == CUTS
