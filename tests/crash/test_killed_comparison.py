"""A comparison that is killed before any operation on the disk goes on with the same command and gives the same numbers."""

import shutil
import signal
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.services.compare.record import is_comparison
from tests.support.comparing import compare, table_of
from tests.support.faulty_disk import CountingDisk, KillingDisk
from tests.support.forked import run_forked
from tests.support.runs import write_rows
from tests.support.tiny_model import build_tiny_model

SHORT = ("training.max_steps=2", "checkpoint.every_steps=1", "data.heldout_fraction=0.5")


def begin(name: str, *, auto: bool = False):
    return compare("rows=50%,100%", f"run.name={name}", *SHORT, auto=auto)


@pytest.mark.parametrize("stride", [97, pytest.param(13, marks=pytest.mark.slow)])
def test_kill_before_any_operation_of_a_comparison(tmp_path, monkeypatch, stride):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl", 44)
    build_tiny_model(tmp_path / "model", dropout=0.1)
    begin("warm")  # the cache is filled
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        whole = table_of(begin("whole"))
    for at in range(1, disk.count + 1, stride):

        def work(at=at):
            storage.disk = KillingDisk(at)
            begin("cut")

        assert run_forked(work) == -signal.SIGKILL
        is_there = is_comparison(Path("runs/cut"))
        assert table_of(begin("cut", auto=is_there)) == whole
        assert not list(Path("runs/cut").rglob("*.safetensors"))
        shutil.rmtree("runs/cut")
