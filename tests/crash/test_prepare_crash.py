"""Preparation that is killed, raced or tampered with never leaves data that is half or wrong."""

import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from sftcli import storage
from sftcli.config.schema.data import DataSettings
from sftcli.data.example import Example
from sftcli.data.prepared.about import AboutRows
from sftcli.data.prepared.store import HELDOUT, TRAIN, PreparedWriter, open_prepared
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError
from sftcli.events import NeverStop, Session, Warned
from sftcli.services.prepare.prepare import prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.crash.test_two_trainers import start_together
from tests.support.faulty_disk import CountingDisk, KillingDisk
from tests.support.forked import run_forked
from tests.support.recording import RecordingSink
from tests.support.runs import write_rows
from tests.support.tiny_model import build_tiny_model


def write(folder: Path) -> None:
    with PreparedWriter(folder) as writer:
        for line in range(20):
            example = Example(
                input_ids=np.arange(5 + line, dtype=np.int32),
                loss_mask=np.arange(5 + line) > 2,
                origin=Origin(path="rows", line=line),
            )
            writer.add(TRAIN if line % 4 else HELDOUT, example)
        writer.finish(AboutRows(audit={}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kill_at_every_operation_leaves_all_or_nothing_and_the_next_try_is_equal(tmp_path, monkeypatch):
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        write(tmp_path / "whole" / "key")
    golden = contents(tmp_path / "whole" / "key")
    for at in range(1, disk.count + 1):
        folder = tmp_path / str(at) / "key"

        def work(folder=folder, at=at):
            storage.disk = KillingDisk(at)
            write(folder)

        assert run_forked(work) == -signal.SIGKILL
        if folder.exists():
            open_prepared(folder)
        else:
            write(folder)
        assert contents(folder) == golden
    assert disk.count >= 10


def test_leftovers_of_killed_preparations_are_removed_after_a_day(tmp_path):
    left = {age: storage.scratch_path(tmp_path, storage.TEMPORARY, f"key{age}") for age in (0, 25)}
    for hours, folder in left.items():
        folder.mkdir()
        (folder / "train.arrow").write_bytes(b"half")
        for path in (folder / "train.arrow", folder):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    (tmp_path / "other").mkdir()
    write(tmp_path / "key")
    assert {path.name for path in tmp_path.iterdir()} == {"key", "other", left[0].name}


def prepare(folder: Path, model: Path, sink=None):
    settings = DataSettings(sources=(str(folder / "rows.jsonl"),), heldout_fraction=0.2)
    return prepare_data(
        settings,
        find_sources(settings),
        model_folder=model,
        seed=0,
        session=Session(sink or RecordingSink(), NeverStop()),
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_flipped_bit_in_the_cache_is_told_and_the_data_prepared_again(tmp_path, split):
    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model")
    first = prepare(tmp_path, model)
    folder, print_before = first.dataset.folder, first.dataset.fingerprint
    golden = contents(folder)
    path = folder / f"{split}.arrow"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.unlink()  # the open data set maps the old file
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=path.name):
        open_prepared(folder)
    sink = RecordingSink()
    again = prepare(tmp_path, model, sink)
    assert f"{path.name} is missing or was changed" in sink.of(Warned)[0].text
    assert again.dataset.fingerprint == print_before
    assert contents(folder) == golden


def test_four_that_prepare_the_same_rows_together_all_succeed_with_one_result(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model")
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert start_together([lambda: prepare(tmp_path, model)] * 4) == [0, 0, 0, 0]
    (folder,) = [
        path for path in (tmp_path / "cache" / "prepared").iterdir() if not path.name.startswith(".")
    ]
    assert len(open_prepared(folder).train) == 20
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
