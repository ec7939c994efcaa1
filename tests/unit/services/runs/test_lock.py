"""One run, one trainer."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.errors import OutputError, StorageError
from sftcli.events import Warned
from sftcli.services.runs import lock as lock_module
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.lock import (
    GUARD,
    LOCK,
    SILENT_SECONDS,
    EvaluationLock,
    OutputLock,
    RunLock,
    holder_state,
    read_holder,
    this_process,
)
from tests.support.faulty_disk import CountingDisk, FailingDisk
from tests.support.forked import run_forked
from tests.support.recording import RecordingSink


def forge(run: Path, **changes: object) -> None:
    (run / LOCK).write_text(json.dumps(asdict(replace(this_process(), **changes))))


def test_lock_says_who_trains_and_is_gone_afterwards(tmp_path: Path) -> None:
    with RunLock(tmp_path, RecordingSink()) as lock:
        holder = read_holder(tmp_path / LOCK)
        assert holder is not None
        assert holder.pid == os.getpid()
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_second_trainer_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with RunLock(tmp_path, RecordingSink()):
        with pytest.raises(OutputError, match=rf"in use by pid {os.getpid()} on ") as caught:
            RunLock(tmp_path, RecordingSink()).__enter__()
        assert "--break-lock" in caught.value.hint
        assert caught.value.exit_code == 73


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"born": "1"}, {"boot": "another boot"}],
    ids=["process is gone", "process number was given again", "machine was started again"],
)
def test_lock_of_a_dead_process_here_is_taken_over_with_a_word(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    forge(tmp_path, **changes)
    sink = RecordingSink()
    with RunLock(tmp_path, sink) as lock:
        lock.check()
    (warning,) = sink.of(Warned)
    assert "taking over from pid" in warning.text


def test_lock_of_a_killed_child_is_taken_over(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        forge(tmp_path, pid=child.pid, born=stat[19])
        with pytest.raises(OutputError):
            RunLock(tmp_path, RecordingSink()).__enter__()
        child.send_signal(signal.SIGKILL)
        while Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
            pass
        with RunLock(tmp_path, RecordingSink()):  # a zombie is dead, too
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("silent", [0.0, SILENT_SECONDS - 1])
def test_holder_on_another_machine_is_believed_while_its_heart_beats(silent: float) -> None:
    me = this_process()
    assert holder_state(replace(me, host="elsewhere", pid=1), me, silent_seconds=silent) == "alive"


def test_holder_on_another_machine_is_dead_after_ten_silent_minutes(tmp_path: Path) -> None:
    forge(tmp_path, host="elsewhere")
    with pytest.raises(OutputError):
        RunLock(tmp_path, RecordingSink()).__enter__()
    old = time.time() - SILENT_SECONDS - 5
    os.utime(tmp_path / LOCK, (old, old))
    with RunLock(tmp_path, RecordingSink()) as lock:
        lock.check()


def test_living_holder_is_taken_over_when_the_user_says_it_is_dead(tmp_path: Path) -> None:
    forge(tmp_path, host="elsewhere")
    sink = RecordingSink()
    with RunLock(tmp_path, sink, break_lock=True) as lock:
        lock.check()
    assert len(sink.of(Warned)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe"])
def test_lock_that_says_nothing_locks_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with RunLock(tmp_path, RecordingSink()) as lock:
        lock.check()


def test_guard_of_a_killed_process_does_not_block_for_ever(tmp_path: Path) -> None:
    (tmp_path / GUARD).touch()
    os.utime(tmp_path / GUARD, (time.time() - 60,) * 2)
    with RunLock(tmp_path, RecordingSink()) as lock:
        lock.check()


@pytest.mark.parametrize("fate", ["deleted", "taken over"])
def test_loss_of_the_lock_is_noticed_and_the_new_holder_left_alone(tmp_path: Path, fate: str) -> None:
    with RunLock(tmp_path, RecordingSink()) as lock:
        if fate == "deleted":
            (tmp_path / LOCK).unlink()
        else:
            forge(tmp_path, host="elsewhere")
        with pytest.raises(StorageError, match="no longer owns run "):
            lock.check()
    assert (tmp_path / LOCK).exists() == (fate == "taken over")


def test_lock_needs_neither_flock_nor_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object, **__: object) -> None:
        raise OSError("not on this file system")

    for module, name in ((fcntl, "flock"), (os, "symlink"), (os, "link")):
        monkeypatch.setattr(module, name, refuse)
    with RunLock(tmp_path, RecordingSink()) as lock:
        lock.check()


def take_and_die(out: Path) -> None:
    def work() -> None:
        OutputLock(out).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(work) == -signal.SIGKILL


def test_lock_of_an_output_that_a_killed_process_left_blocks_nobody_and_is_swept(tmp_path: Path) -> None:
    out, sink = tmp_path / "new" / ("x" * 250), RecordingSink()
    take_and_die(out)
    with OutputLock(out, sink):
        assert "ended without a message (killed?)" in sink.of(Warned)[0].text
        assert not out.parent.exists()
    assert list(tmp_path.iterdir()) == []
    take_and_die(out)
    (left,) = tmp_path.iterdir()
    assert storage.sweep(tmp_path, is_locked=True) == []  # it may be held, by somebody who makes no run
    os.utime(left, (1e9, 1e9))
    assert storage.sweep(tmp_path) == [left.name]


def test_one_output_has_one_lock_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    with OutputLock(Path("there/a.jsonl")):
        for other in (Path("there/../link/a.jsonl"), tmp_path / "there" / "a.jsonl"):
            with pytest.raises(OutputError, match="in use by pid"):
                OutputLock(other).__enter__()
        with OutputLock(Path("there/b.jsonl")), EvaluationLock(RunFolder(tmp_path / "there")):
            pass


def test_lock_that_could_not_be_taken_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        with OutputLock(tmp_path / "out"):
            taken = disk.count
    for at in range(1, taken + 1):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", FailingDisk(at, errno.EIO))
            with suppress(OSError, StorageError), OutputLock(tmp_path / "out"):
                pass
        assert list(tmp_path.iterdir()) == [], disk.log[at - 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_in_a_folder_that_may_not_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError):
        OutputLock(tmp_path / "a").__enter__()


def test_holder_of_the_same_job_elsewhere_is_dead_after_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher starts a job anew only when it has lost what it had started."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    me = this_process()
    assert me.job == "torchrun night"
    earlier, stranger = replace(me, host="elsewhere"), replace(me, host="elsewhere", job="torchrun day")
    states = [
        [holder_state(holder, me, silent_seconds=seconds) for seconds in (29.0, 31.0)]
        for holder in (earlier, stranger)
    ]
    assert states == [["alive", "dead"], ["alive", "alive"]]


def test_process_of_the_same_job_waits_for_the_earlier_one_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr(lock_module, "_JOB_POLL_SECONDS", 0.02)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.15)"])
    stat = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
    forge(tmp_path, pid=child.pid, born=stat[19], job="Slurm 7.0")
    RunLock(tmp_path, RecordingSink()).require_free()
    with RunLock(tmp_path, RecordingSink()) as lock:
        lock.check()
    assert child.wait() == 0
    forge(tmp_path, job="Slurm 7.1")  # another step of the job, which may be at work
    with pytest.raises(OutputError):
        RunLock(tmp_path, RecordingSink()).__enter__()


def test_holder_of_the_same_job_that_stays_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    monkeypatch.setattr(lock_module, "_JOB_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(lock_module, "_JOB_POLL_SECONDS", 0.02)
    forge(tmp_path, job="torchrun night")
    with pytest.raises(OutputError, match="in use by pid"):
        RunLock(tmp_path, RecordingSink()).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
