"""Work for children that ends in each way that foreign files make libraries end; ``path`` is a file that some of it writes."""

import ctypes
import os
import signal
import time
from pathlib import Path

from sftcli.child import UnfitError
from sftcli.foreign import foreign_file


def note(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")


def crash(_: Path) -> None:
    ctypes.string_at(1)


def bus(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def turn(_: Path) -> None:
    while True:
        pass


def swallow(_: Path) -> None:
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def swallow_guarded(path: Path) -> None:
    with foreign_file(path):
        swallow(path)


def panic(_: Path) -> None:
    class PanicException(BaseException):
        pass

    raise PanicException("index out of\nbounds")


def refuse(_: Path) -> None:
    raise ValueError("the command says it")


def find_unfit(_: Path) -> None:
    raise UnfitError("it holds nothing")


def wait(path: Path) -> None:
    note(path)
    time.sleep(120)
