"""Work on a file of others that may end, freeze or fill the machine is tried in a process of its own first, within limits.

Libraries that are not written in Python do not always raise at what they do not expect: they end the process, or take all
memory. So whoever hands them a file lets a child do it before. What a child got through is remembered in the cache by its
content, so a file is tried once; what it did not is tried again the next time.

The child is a fresh interpreter in a session of its own, so that a signal for the command reaches the command alone. It
ends with its parent, however that ends.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from sftcli import storage
from sftcli.cache import cache_folder
from sftcli.errors import DataError, Location, ResourceError, SftError
from sftcli.foreign import TooLargeError
from sftcli.version import __version__

CPU_SECONDS = 20  # of processor time, which a loaded machine does not use up sooner
_PATIENCE = 15  # times as long, for a child on a loaded machine, or one that waits and does not work
ROOM_BYTES = 2 << 30
# What a file that is read whole may take beside.
BYTES_PER_SECOND = 50 << 20
ROOM_PER_BYTE = 4
# Exit codes: a child's verdict, and an error that the command meets as well and says in its words.
_UNFIT, _REFUSED = 4, 3
_SLOW = {
    getattr(signal, name, None) for name in ("SIGALRM", "SIGXCPU")
}  # out of patience, out of processor time
_PDEATHSIG = 1
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from sftcli.child import serve; serve(*sys.argv[1:])"
# One thread each: threads reserve room that nobody uses, and it would count.
_ENVIRON = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "RUST_BACKTRACE": "0",
}  # fmt: skip
_passed: set[str] = set()  # in this process


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a child: processor time, and memory beside what the interpreter has."""

    seconds: int
    room_bytes: int

    @property
    def too_large(self) -> str:
        """What is said of a file that takes more memory."""
        return f"reading it takes more than {self.room_bytes / 2**30:.0f} GB of memory"


class UnfitError(Exception):
    """Raised by work in a child: why the file is not to be used, as a clause about it."""


def try_first(
    work: str,
    path: Path,
    content: str,
    *,
    versions: str,
    name: str = "",
    hint: str = "copy or download it again, from where you trust it",
    file_bytes: int = 0,
) -> None:
    """Raise unless a child gets through ``work`` on ``path`` within the limits, now or at an earlier time.

    Args:
        work: ``module:function``, which is called with ``path``.
        path: The file or folder.
        content: Changes with all of ``path`` that matters.
        versions: Of the libraries that read it.
        name: What messages call ``path``.
        hint: What to do about a file that does not pass.
        file_bytes: The size of a file that is read whole, with which the limits grow.

    Raises:
        DataError: The child died, took too long or too much memory, or found the file unfit.
        ResourceError: No child can be started.
    """
    parts = (work, content, versions, __version__, sys.version)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (
        key in _passed or not sys.executable
    ):  # an interpreter inside of another program cannot be started again
        return
    verdicts = _verdicts()
    if verdicts is None or not (verdicts / key).exists():
        fault = _fault(work, path, file_bytes)
        if fault is None:
            return
        if fault:
            name = name or str(path)
            raise DataError(f"{name}: {fault}", hint=hint, location=Location(file=name))
        _remember(verdicts, key)
    _passed.add(key)


def _verdicts() -> Path | None:
    """Return the folder that remembers; None where there is no place for it."""
    try:
        return cache_folder() / "tried"
    except SftError:
        return None


def _remember(folder: Path | None, key: str) -> None:
    if folder is not None:
        try:
            storage.make_folders(folder, mode=0o700)
            storage.disk.create_alone(folder / key).close()
        except OSError:  # a full disk, or another process was faster: it is tried again
            return


def _fault(work: str, path: Path, file_bytes: int) -> str | None:
    """Return what became of the work, as a clause about the file; "" where all is well.

    None is for an error that the command meets as well, and says in its own words.
    """
    limits = Limits(
        seconds=CPU_SECONDS + file_bytes // BYTES_PER_SECOND,
        room_bytes=ROOM_BYTES + ROOM_PER_BYTE * file_bytes,
    )
    numbers = (limits.seconds, limits.room_bytes, os.getpid())
    call = (json.dumps(sys.path), work, os.fspath(path), *map(str, numbers))
    command = [sys.executable, "-P", "-c", _START, *call]
    with TemporaryFile() as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | _ENVIRON,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=_PATIENCE * limits.seconds)
        except subprocess.TimeoutExpired:
            code = -int(signal.SIGALRM)
        finally:
            child.kill()
            child.wait()
        return _words(code, stderr, limits)


def _words(code: int, stderr: IO[bytes], limits: Limits) -> str | None:
    if code in (0, _REFUSED):
        return None if code else ""
    stderr.seek(0)
    said = stderr.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
    if code == _UNFIT and said:
        return said[-1]
    if any(line.startswith("memory allocation of ") for line in said):
        return limits.too_large
    if -code in _SLOW:
        return f"reading it was given up after {limits.seconds} seconds"
    if 0 < code < 256:
        why = said[-1] if said else f"exit code {code}"
        raise ResourceError(f"a process that tries files of others cannot start: {why}")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code:#x}"  # the latter on Windows
    return f"the library that reads it crashes ({how})"


def serve(work: str, path: str, seconds: str, room_bytes: str, parent: str) -> None:
    """Do ``work`` on ``path`` in this process, which was started for it, and end."""
    _die_with(int(parent))
    module, _, function = work.partition(":")
    call = getattr(import_module(module), function)
    limits = Limits(seconds=int(seconds), room_bytes=int(room_bytes))
    _apply(limits)
    try:
        call(Path(path))
        code = 0
    except UnfitError as error:
        code = _verdict(str(error))
    except (MemoryError, ResourceError, TooLargeError):
        code = _verdict(limits.too_large)
    except Exception:  # noqa: BLE001 - the command meets it as well
        code = _REFUSED
    except BaseException as error:  # noqa: BLE001 - what Rust calls a panic
        code = _verdict(f"a library fails on it: {' '.join(str(error).split()) or type(error).__name__}")
    os._exit(code)


def _verdict(words: str) -> int:
    sys.stderr.write(f"\n{words}\n")
    sys.stderr.flush()
    return _UNFIT


def _die_with(parent: int) -> None:
    """End this process when ``parent`` ends; where the system does not do that, the limit of time does."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was faster
            os._exit(1)


def _apply(limits: Limits) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's patience is all there is
        return
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: limits.seconds}
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = taken + limits.room_bytes
    for kind, limit in wanted.items():
        most = resource.getrlimit(kind)[1]  # which is not raised
        resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
