"""The program of llama.cpp that makes k-quants of a GGUF file, where the user names one."""

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from sftcli.errors import NotFoundError, OutputError, StoppedError
from sftcli.events import Notice, Session

_LOOK_SECONDS = 0.2  # between looks whether a stop was asked for
_SAID_BYTES = 4000
_HINT = "build llama.cpp, and name its program llama-quantize; or choose --dtype q5_1, which needs none"


def find_program(name: str) -> str:
    """Return the path of the program ``name``, a path or the name of one on ``PATH``.

    Raises:
        NotFoundError: There is none, or it may not be run.
    """
    found = shutil.which(name)
    if found is None:
        raise NotFoundError(f"--llama-quantize {name}: there is no such program", hint=_HINT)
    return str(Path(found).absolute())


def quantize(program: str, source: Path, target: Path, *, kind: str, session: Session) -> None:
    """Let ``program`` write the file ``source`` as ``kind`` to the new file ``target``.

    Raises:
        OutputError: It fails, or writes nothing.
        StoppedError: A stop was asked for, and it was ended.
    """
    session.emit(Notice(text=f"making {kind} with {program}"))
    with TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [program, str(source.absolute()), str(target.absolute()), kind.upper()],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        except OSError as error:
            raise OutputError(f"{program} cannot be run: {error.strerror}", hint=_HINT) from error
        code = _wait(process, session)
        last = _last_line(stderr)
    if code or not target.is_file():
        ended = f"failed with {code}" if code else "has written nothing"
        raise OutputError(f"{program} {ended}{last and f': {last}'}", hint=_HINT)


def _wait(process: "subprocess.Popen[bytes]", session: Session) -> int:
    try:
        while not session.stop.requested():
            try:
                return process.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        raise StoppedError
    finally:
        process.kill()
        process.wait()


def _last_line(said: IO[bytes]) -> str:
    """Return the last line that the program printed, "" for none."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID_BYTES))
    lines = said.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
