"""One run, one trainer: a lock file that names the process, and the test whether it still lives. Other files that grow have one too.

The lock is a courtesy between well-behaved processes. What makes two trainers safe is that a checkpoint is written under a
name of its own and that the lock is read again before it is published. Nothing here needs ``flock``, links or equal clocks.
"""

import hashlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import ClassVar, Self

from sftcli import storage
from sftcli.environment import job_of
from sftcli.errors import OutputError, StorageError
from sftcli.events import EventSink, Warned, unheard
from sftcli.own_files import OwnFile
from sftcli.services.runs.folder import RunFolder

_GUARD_SUFFIX = "-guard"
LOCK = ".lock"
GUARD = LOCK + _GUARD_SUFFIX
BEAT_SECONDS = 60.0
SILENT_SECONDS = 600.0  # after which the holder on another machine is taken for dead
# The same where a launcher has started the holder and this process for one job: it does so anew after a machine is lost.
JOB_BEAT_SECONDS, JOB_SILENT_SECONDS = 5.0, 30.0
_JOB_WAIT_SECONDS = 2 * JOB_SILENT_SECONDS  # for the holder's end or silence
_GUARD_SECONDS = 30.0  # the guard is held for milliseconds
_WAIT_SECONDS = 0.02
_JOB_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds a lock. ``born`` distinguishes it from a later process with the same id."""

    pid: int
    host: str
    boot: str
    born: str
    since: str
    token: str
    job: str = ""  # as ``job_of`` returns


class FileLock:
    """The lock file ``path``, held while a process works on ``thing``. Use as a context manager.

    ``scratch`` is the kind of its own scratch files: who holds the lock of a run may not sweep those of another lock there.

    Raises:
        OutputError: Another process works on it; ``hint`` says what to do.
    """

    scratch: ClassVar[str] = storage.OUTPUT

    def __init__(
        self, path: Path, emit: EventSink, *, thing: str, hint: str, break_lock: bool = False
    ) -> None:
        self.path, self.guard = path, path.with_name(path.name + _GUARD_SUFFIX)
        self.emit = emit
        self.thing, self.hint = thing, hint
        self.break_lock = break_lock
        self.me = this_process()
        self._ended = Event()
        self._heart = Thread(target=self._beat, name="lock heartbeat", daemon=True)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _JOB_WAIT_SECONDS
        while not self._take(waits=time.monotonic() < deadline):
            time.sleep(_JOB_POLL_SECONDS)
        self._heart.start()
        return self

    def _take(self, *, waits: bool) -> bool:
        """Return whether the lock is had, or, if ``waits``, that an earlier process of this job has not ended yet."""
        self._take_guard()
        try:
            holder = read_holder(self.path)
            if holder is not None and not self._take_over(holder, waits=waits):
                return False
            _HOLDERS.write(self.path, self.me, kind=self.scratch)
        except OSError:
            storage.try_remove_tree(self.path)  # nobody who lives held it, and this process does not go on
            raise
        finally:
            storage.try_remove_tree(self.guard)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if read_holder(self.path) == self.me:  # else another process has taken the run over
            storage.try_remove_tree(self.path)

    def require_free(self) -> None:
        """Refuse early, before anything is loaded, what taking the lock would refuse. Nothing is changed.

        Raises:
            OutputError: Another process works on it.
        """
        holder = read_holder(self.path)
        if holder is not None and is_held(self.path) and not is_of_job(holder, self.me):
            raise self._in_use(holder)

    def check(self) -> None:
        """Make sure that this process still holds the lock.

        Raises:
            StorageError: The lock or its folder is gone, or another process has taken it over.
        """
        holder = read_holder(self.path)
        if holder == self.me:
            return
        if not self.path.parent.is_dir():
            raise StorageError(
                f"the folder of {self.thing} is gone: {self.path.parent}; nothing more is saved",
                hint="somebody has removed or moved it: put it back and resume it, or run the same command again",
            )
        what = "its lock is gone" if holder is None else f"{_describe(holder)} has taken it over"
        raise StorageError(
            f"this process no longer owns {self.thing}: {what}; nothing more is saved",
            hint="let one process work on it at a time",
        )

    def _take_over(self, holder: Holder, *, waits: bool) -> bool:
        silent = self.guard.stat().st_mtime - self.path.stat().st_mtime  # both times are the file server's
        state = holder_state(holder, self.me, silent_seconds=silent)
        if state == "alive" and not self.break_lock:
            if waits and is_of_job(holder, self.me):
                return False
            raise self._in_use(holder)
        why = "it was declared dead" if state == "alive" else "it ended without a message (killed?)"
        self.emit(Warned(text=f"taking over from {_describe(holder)}: {why}"))
        return True

    def _in_use(self, holder: Holder) -> OutputError:
        return OutputError(
            f"{self.thing} is in use by {_describe(holder)}", hint=f"wait for it, or stop it; {self.hint}"
        )

    def _take_guard(self) -> None:
        deadline = time.monotonic() + 2 * _GUARD_SECONDS
        while True:
            try:
                guard = storage.disk.create_alone(self.guard)
            except FileExistsError:
                self._drop_stale_guard()
                if time.monotonic() > deadline:
                    raise OutputError(f"cannot lock {self.thing}: {self.guard} was not released") from None
                time.sleep(_WAIT_SECONDS)
            else:
                guard.close()
                return

    def _drop_stale_guard(self) -> None:
        """Remove the guard of a process that was killed within the few milliseconds of holding it."""
        probe = self.guard.with_name(f"{self.guard.name}-{secrets.token_hex(4)}")
        try:
            storage.write_file(probe, [])  # its time is the file server's now
            if probe.stat().st_mtime - self.guard.stat().st_mtime > _GUARD_SECONDS:
                storage.disk.unlink(self.guard)
        except FileNotFoundError:
            return
        finally:
            storage.try_remove_tree(probe)

    def _beat(self) -> None:
        while not self._ended.wait(JOB_BEAT_SECONDS if self.me.job else BEAT_SECONDS):
            if read_holder(self.path) != self.me:
                return  # ``check`` says so at the next save
            try:
                storage.disk.touch(self.path)
            except OSError:
                continue  # a drive that is away for a while


class RunLock(FileLock):
    """Held while a run is trained.

    Raises:
        OutputError: Another process trains the run.
    """

    scratch = storage.TEMPORARY

    def __init__(self, run: Path, emit: EventSink, *, break_lock: bool = False) -> None:
        dead = f"if it is certainly dead: sft resume {RunFolder(run).argument} --break-lock"
        super().__init__(run / LOCK, emit, thing=f"run {run.name}", hint=dead, break_lock=break_lock)


class OutputLock(FileLock):
    """Held while a command makes ``out``, so that of several with one output the first makes it and the others are told at once.

    It lies in the nearest folder that is there. Its name is one of ours, so that a sweep takes what a kill has left.

    Raises:
        OutputError: Another process makes it, or the folder may not be written to.
        StorageError: Its disk is full.
    """

    def __init__(self, out: Path, emit: EventSink = unheard) -> None:
        folder = storage.nearest_folder(out.parent)
        inside = (out.parent.resolve() / out.name).relative_to(folder.resolve()).as_posix()
        token = hashlib.sha256(inside.encode(errors="surrogateescape")).hexdigest()
        path = storage.scratch_path(folder, storage.OUTPUT, "lock", token=token)
        super().__init__(path, emit, thing=str(out), hint=f"if it is certainly dead, delete {path}")

    def __enter__(self) -> Self:
        with storage.storage_errors(self.path.parent, "choose another --out"):
            return super().__enter__()


class EvaluationLock(FileLock):
    """Held while scores are made that are kept with a run: they and the page about them are to be of one evaluation.

    Raises:
        OutputError: Another process scores the run, or its folder may not be written to.
        StorageError: Its disk is full.
    """

    def __init__(self, run: RunFolder, emit: EventSink = unheard) -> None:
        path = run.path / f"{LOCK}-eval"
        thing = f"the evaluation of {run.name}"
        super().__init__(path, emit, thing=thing, hint=f"if it is certainly dead, delete {path}")

    def __enter__(self) -> Self:
        with storage.storage_errors(self.path.parent, "name the rows with --data: their scores are not kept"):
            return super().__enter__()


def this_process() -> Holder:
    """Return what a lock says about this process."""
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        boot=_boot(),
        born=process_start(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=secrets.token_hex(8),
        job=job_of(os.environ),
    )


def read_holder(path: Path) -> Holder | None:
    """Return the holder of a lock; None if there is none or the file is unreadable."""
    return _HOLDERS.find_whole(path)


_HOLDERS = OwnFile(form=Holder, hint="delete it if no process works there")


def holder_state(holder: Holder, me: Holder, *, silent_seconds: float) -> str:
    """Return "alive" or "dead". On this machine the process is looked up; elsewhere its heartbeat decides."""
    # Another boot of this machine has none of its processes.
    # Windows has no signal that only asks: there the heartbeat decides as well.
    is_looked_up = holder.host == me.host and os.name == "posix"
    if is_looked_up and (holder.boot != me.boot or _is_gone(holder)):
        return "dead"
    if not is_looked_up and silent_seconds > (
        JOB_SILENT_SECONDS if is_of_job(holder, me) else SILENT_SECONDS
    ):
        return "dead"
    return "alive"


def is_of_job(holder: Holder, me: Holder) -> bool:
    """Return whether a launcher has started both for one job, which it starts anew only when it has lost what it had started."""
    return bool(me.job) and holder.job == me.job


def is_held(path: Path) -> bool:
    """Return whether a process that is not known to be dead holds the lock at ``path``. Nothing is changed."""
    holder = read_holder(path)
    if holder is None:
        return False
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return holder_state(holder, this_process(), silent_seconds=silent) == "alive"


def _is_gone(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)  # sends nothing: it asks
    except (ProcessLookupError, OverflowError):  # or a number that no process can have
        return True
    except PermissionError:
        pass  # somebody else's process
    born = process_start(holder.pid)
    return bool(born and holder.born and born != holder.born)


def process_start(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty if unknown, "dead" for a zombie."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        )
    except (OSError, IndexError):
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _describe(holder: Holder) -> str:
    return f"pid {holder.pid} on {holder.host} since {holder.since}"
