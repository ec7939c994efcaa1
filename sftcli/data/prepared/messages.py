"""Kept rows as messages in JSON lines, in their order: any format in, one format out."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np

from sftcli import storage
from sftcli.data.conversations.as_messages import read_line
from sftcli.data.conversations.messages import Conversation
from sftcli.data.prepared.store import HELDOUT, TRAIN, PreparedDataset, messages_file, require_unchanged
from sftcli.data.reading.record import Origin
from sftcli.json_files import write_json

JSON_LINES = ".jsonl"
_HINT = "choose another place with --out"
_NAMES = {TRAIN: "train.jsonl", HELDOUT: "validation.jsonl"}


def write_messages(dataset: PreparedDataset, out: Path) -> None:
    """Write all conversations of ``dataset``: to the file ``out`` where its name ends in ``.jsonl``, else to a folder.

    The folder has ``train.jsonl``, ``validation.jsonl`` of held-out rows, where there are some, and ``audit.json``; the one file has
    the held-out rows behind the others.

    Raises:
        OutputError: It exists, or cannot be made.
        DataError: The rows were not kept, or were changed since.
        StorageError: The disk is full.
    """
    sources = {split: _kept_file(dataset, split) for split in _NAMES}
    with storage.writing(out, _HINT):
        if out.suffix == JSON_LINES:
            with storage.whole_file(out, hint=_HINT, is_new=True) as fresh:
                _join(list(sources.values()), fresh)
            return
        with storage.atomic_folder(out, hint=_HINT, is_new=True) as folder:
            for split, name in _NAMES.items():
                if split == TRAIN or sources[split].stat().st_size:
                    _join([sources[split]], folder / name)
            write_json(folder / "audit.json", dataset.about.to_json())


class KeptMessages(Sequence[Conversation]):
    """The rows of one split as conversations, each read from the file when it is asked for; held-out ones in their order.

    A row that an epoch has several times is here once.

    Raises:
        DataError: The rows were not kept, or were changed since.
    """

    def __init__(self, dataset: PreparedDataset, split: str) -> None:
        self._path = _kept_file(dataset, split)
        size = self._path.stat().st_size
        self._bytes = np.memmap(self._path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        self._ends = np.flatnonzero(self._bytes == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int, /) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice, /) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        begin = int(self._ends[index - 1]) + 1 if index else 0
        line = self._bytes[begin : int(self._ends[index])].tobytes().decode()
        return read_line(line, Origin(path=str(self._path), line=index + 1))


def _kept_file(dataset: PreparedDataset, split: str) -> Path:
    """Return the file of a split's messages, which is as it was written.

    Raises:
        DataError: It is not, or there is none.
    """
    path = messages_file(dataset.folder, split)
    require_unchanged(path, dataset.manifest)
    return path


def _join(sources: list[Path], target: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(source.open("rb")) for source in sources]
        storage.write_file(target, chain.from_iterable(map(storage.chunks, files)))
