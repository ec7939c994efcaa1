"""Disks that stop the machine, or fail, at the n-th operation that changes something."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sftcli.storage import Disk


class CountingDisk(Disk):
    """Counts operations and gives every one of them a chance to fail; ``log`` keeps their names and paths."""

    def __init__(self) -> None:
        self.count = 0
        self.log: list[tuple[str, str]] = []

    def before(self, what: str, path: object) -> None:
        self.count += 1
        self.log.append((what, Path(str(path)).name))

    def make_folder(self, path: Path, *, mode: int = 0o777) -> None:
        self.before("make_folder", path)
        super().make_folder(path, mode=mode)

    def create(self, path: Path) -> BinaryIO:
        self.before("create", path)
        return super().create(path)

    def create_alone(self, path: Path, *, mode: int = 0o666) -> BinaryIO:
        self.before("create_alone", path)
        return super().create_alone(path, mode=mode)

    def append(self, path: Path) -> BinaryIO:
        self.before("append", path)
        return super().append(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self.before("write", file.name)
        super().write(file, data)

    def truncate(self, path: Path, size: int) -> None:
        self.before("truncate", path)
        super().truncate(path, size)

    def sync(self, path: Path) -> None:
        self.before("sync", path)
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", source)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.before("unlink", path)
        super().unlink(path)

    def remove_folder(self, path: Path) -> None:
        self.before("remove_folder", path)
        super().remove_folder(path)

    def link(self, path: Path, target: Path) -> None:
        self.before("link", path)
        super().link(path, target)

    def touch(self, path: Path) -> None:
        self.before("touch", path)
        super().touch(path)

    def copy_mode(self, source: Path, target: Path) -> None:
        self.before("copy_mode", target)
        super().copy_mode(source, target)

    def let_library_write(self, folder: Path, write: Callable[[], object]) -> None:
        self.before("library begins", folder)
        super().let_library_write(folder, write)
        self.before("library has written", folder)


class TellingDisk(CountingDisk):
    """Writes each operation into the file ``told`` as it comes, for who counts those of another process."""

    def __init__(self, told: Path) -> None:
        super().__init__()
        self.told = told

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        with self.told.open("a", encoding="utf-8") as file:
            file.write(f"{what}\t{path}\n")


class FullDisk(CountingDisk):
    """Has no room left below ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder.absolute()

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        if Path(file.name).absolute().is_relative_to(self.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        super().write(file, data)


class KillingDisk(CountingDisk):
    """Kills the process before operation ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class FailingDisk(CountingDisk):
    """Raises ``OSError(number)`` at operation ``at``, and from then on at each one if ``forever``."""

    def __init__(self, at: int, number: int, *, forever: bool = False) -> None:
        super().__init__()
        self.at, self.number, self.forever = at, number, forever

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        if self.count == self.at or (self.forever and self.count > self.at):
            raise OSError(self.number, os.strerror(self.number), str(path))


class LossyDisk(CountingDisk):
    """Forgets, when ``lose_power`` is called, the content of every file that was not synced: the size stays, zeros remain."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.unsynced: set[Path] = set()

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        if self.count == self.at:
            raise PowerLost

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        super().write(file, data)
        self.unsynced.add(Path(file.name))

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.unsynced.discard(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.unsynced = {
            target / path.relative_to(source) if path.is_relative_to(source) else path
            for path in self.unsynced
        }

    def lose_power(self) -> None:
        for path in self.unsynced:
            if path.is_file():
                path.write_bytes(b"\0" * path.stat().st_size)


class PowerLost(BaseException):
    """The machine went dark; nothing may clean up after it, so handlers of ``Exception`` must not see it."""
