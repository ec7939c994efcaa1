import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from sftcli import storage
from sftcli.events import CheckpointSaved, Progressed, Warned
from sftcli.storage import Disk
from sftcli.training.checkpoint import background_saver
from sftcli.training.checkpoint.background_saver import Saver
from tests.support.recording import RecordingSink


def save_of(seconds: float, times: int) -> RecordingSink:
    sink, now = RecordingSink(), [0.0]

    def write() -> str:
        now[0] += seconds
        return "here"

    saver = Saver(sink, lambda: now[0])
    for step in range(times):
        saver.save_now(step, write, is_last=False)
    return sink


def test_save_that_a_scheduler_would_cut_off_is_warned_of_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    sink = save_of(31.0, times=3)
    assert len(sink.of(CheckpointSaved)) == 3
    (warning,) = sink.of(Warned)
    assert "saving took 31 s" in warning.text
    assert "--signal=USR1@120" in warning.text


def test_slow_save_where_nothing_would_cut_it_off_is_not_warned_of(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert save_of(31.0, times=3).of(Warned) == []


def test_quick_save_is_not_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert save_of(2.0, times=2).of(Warned) == []


def test_a_save_that_is_waited_for_has_a_sign_that_moves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background_saver, "SIGN_SECONDS", 0.02)
    sink = RecordingSink()
    saver = Saver(sink, time.monotonic)
    saver.begin(38, lambda: time.sleep(0.2) or "here")
    saver.finish(wait=True)
    *waits, last = sink.of(Progressed)
    assert len(waits) >= 2
    assert {event.task for event in sink.of(Progressed)} == {"waiting for the checkpoint of step 38"}
    assert (last.done, last.total) == (1, 1)
    saver.begin(39, lambda: "here")
    time.sleep(0.05)
    saver.finish(wait=True)
    assert sink.of(Progressed)[-1] is last


def test_a_save_steps_aside_until_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a machine whose cores others keep busy, a thread of the lowest priority stands still."""
    lowest: set[int] = set()
    monkeypatch.setattr(background_saver, "step_aside", lambda: lowest.add(threading.get_ident()))
    who: list[int] = []
    first_seen, wait_seen = threading.Event(), threading.Event()

    class Watched(Disk):
        def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
            who.append(threading.get_ident())
            super().write(file, data)
            first_seen.set()

    monkeypatch.setattr(storage, "disk", Watched())

    def save() -> str:
        storage.write_file(tmp_path / "a", [b"x"])
        wait_seen.wait(10)
        storage.write_file(tmp_path / "b", [b"x"])
        return "here"

    saver = Saver(lambda event: wait_seen.set() if isinstance(event, Progressed) else None, time.monotonic)
    monkeypatch.setattr(background_saver, "SIGN_SECONDS", 0.02)
    saver.begin(1, save)
    first_seen.wait(10)
    saver.finish(wait=True)
    assert [thread in lowest for thread in who] == [True, False]
