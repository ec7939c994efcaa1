"""How several processes write one checkpoint: the first one leads, and the others write their parts where it says.

They leave notes for each other, beside the collectives of the training, which goes on meanwhile. Each save is a row of turns. In
one the first process names the folder to write in, and each of the others answers with the sizes and hashes of its files, or with
why there are none. The last turn says how the save has ended.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sftcli import storage
from sftcli.errors import StorageError, UnsavedError
from sftcli.own_files import Stamp
from sftcli.runtime import monotonic
from sftcli.training.checkpoint.format import write_part
from sftcli.training.distributed.group import EXCHANGE_SECONDS
from sftcli.training.state import TrainingSnapshot

_SOON_SECONDS, _LATER_SECONDS = 0.02, 0.5  # between looks for a note, at first and in the end


class Notes(Protocol):
    """Texts that processes leave for each other by name; any thread may, and none blocks another."""

    def leave(self, name: str, text: str, /) -> None:
        """Leave ``text``."""

    def find(self, name: str, /) -> str | None:
        """Return the text of that name once it is there. Where a process has failed meanwhile, what that means is raised."""


class Leader:
    """The first process's side."""

    def __init__(self, notes: Notes, *, processes: int) -> None:
        self._notes = notes
        self._processes = processes
        self._turn = 0

    def ask_for_parts(self, folder: Path) -> None:
        """Let the others write into ``folder``, which is there."""
        self._say({"folder": folder.name})

    def parts(self) -> dict[str, Stamp]:
        """Return the files of the others, once each of them has written its own or has failed.

        Raises:
            OSError, StorageError: One could not, as it was raised there.
        """
        answers = [
            _awaited(self._notes, f"{self._turn}/{rank}", of=f"process {rank}")
            for rank in range(1, self._processes)
        ]
        for answer in answers:
            if "errno" in answer:
                raise OSError(answer["errno"], answer["text"])
            if "unsaved" in answer:
                raise StorageError(answer["unsaved"], hint=answer["hint"])
        return {name: Stamp(**stamp) for answer in answers for name, stamp in answer["files"].items()}

    def end(self, path: str) -> None:
        """Let the others go on: the checkpoint is at ``path``."""
        self._say({"path": path})

    def end_with(self, error: Exception) -> None:
        """Let the others go on: there is none, because of ``error``."""
        about = error if isinstance(error, StorageError) else UnsavedError(f"{type(error).__name__}: {error}")
        self._say({"unsaved": about.message, "hint": about.hint, "passes": isinstance(about, UnsavedError)})

    def _say(self, what: Mapping[str, object]) -> None:
        self._turn += 1
        self._notes.leave(str(self._turn), json.dumps(what))


class PartStore:
    """The store of a process that follows: it writes its part of each checkpoint into ``root`` where the first one says."""

    def __init__(self, root: Path, notes: Notes, *, rank: int, weights_name: str) -> None:
        self.root = root
        self.rank = rank
        self.weights_name = weights_name
        self._notes = notes
        self._turn = 0

    def save(self, snapshot: TrainingSnapshot, /) -> str:
        """Write this process's part; return the path of the checkpoint once all of it is durable.

        Raises:
            StorageError, UnsavedError: As in the first process.
        """
        while True:
            self._turn += 1
            said = _awaited(self._notes, str(self._turn), of="the first process")
            if "path" in said:
                return str(said["path"])
            if "unsaved" in said:
                raise (UnsavedError if said["passes"] else StorageError)(said["unsaved"], hint=said["hint"])
            self._answer(partial(self._write, self.root / str(said["folder"]), snapshot))

    def _write(self, folder: Path, snapshot: TrainingSnapshot) -> dict[str, Stamp]:
        files = write_part(folder, snapshot, weights_name=self.weights_name)
        storage.disk.sync(folder)
        return files

    def _answer(self, write: Callable[[], dict[str, Stamp]]) -> None:
        """Write, and tell the first process how that went; what a disk does not cause is raised here as well."""
        answer: dict[str, object]
        try:
            answer = {"files": {name: asdict(stamp) for name, stamp in write().items()}}
        except OSError as error:
            answer = {"errno": error.errno, "text": error.strerror or str(error)}
        except StorageError as error:
            answer = {"unsaved": error.message, "hint": error.hint}
        except Exception as error:
            self._tell({"unsaved": f"process {self.rank}: {type(error).__name__}: {error}", "hint": ""})
            raise
        self._tell(answer)

    def _tell(self, answer: Mapping[str, object]) -> None:
        self._notes.leave(f"{self._turn}/{self.rank}", json.dumps(answer))


def _awaited(notes: Notes, name: str, *, of: str) -> dict[str, Any]:
    """Return what the note ``name`` says, once it is there.

    Raises:
        UnsavedError: It does not come.
    """
    end, pause = monotonic() + EXCHANGE_SECONDS, _SOON_SECONDS
    while (text := notes.find(name)) is None:
        if monotonic() > end:
            raise UnsavedError(f"a checkpoint was not saved: {of} said nothing for {EXCHANGE_SECONDS} s")
        time.sleep(pause)
        pause = min(_LATER_SECONDS, 1.2 * pause)
    found: dict[str, Any] = json.loads(text)
    return found
