"""Prepared examples on disk: memory-mapped Arrow files and a manifest, whole or absent.

PREPARED/
  train.arrow     one row an example: input_ids, loss_mask, path, line, kind, score, row
  heldout.arrow   the same
  text.arrow      the same, of plain text that is mixed into training; often without rows
  train.jsonl     the rows as messages, one a line, where they were asked for; heldout.jsonl alike
  manifest.json   format, what it was made of, counts, audit, size and hash of these files, the largest token id of each;
                  written last
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

import numpy as np

from sftcli import storage
from sftcli.data.example import Example, RowFlag
from sftcli.data.prepared.about import MANIFESTS, AboutEarlier, AboutRows, Manifest
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError, NotFoundError, StorageError
from sftcli.own_files import Stamp, stamp_of

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
TRAIN, HELDOUT, TEXT = "train", "heldout", "text"
SPLITS = (TRAIN, HELDOUT, TEXT)
ROWS_PER_CHUNK = 1024
_MESSAGES = ".jsonl"  # ends the name of a file that has rows as messages


class ExampleTable:
    """The examples of one split, read from a memory-mapped file as they are asked for.

    Args:
        table: The examples.
        largest_id: Of their tokens, where it is known.
    """

    def __init__(self, table: "pa.Table", largest_id: int | None = None) -> None:
        self._largest_id = largest_id
        self._chunks = table.to_batches()
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self.num_tokens: Sequence[int] = [
            length for chunk in self._chunks for length in chunk["input_ids"].value_lengths().to_pylist()
        ]

    def joined(self, other: "ExampleTable") -> "ExampleTable":
        """Return a table of these rows and, behind them, those of ``other``; nothing is copied."""
        import pyarrow as pa

        largest = (
            None
            if self._largest_id is None or other._largest_id is None
            else max(self._largest_id, other._largest_id)
        )
        return ExampleTable(pa.Table.from_batches([*self._chunks, *other._chunks]), largest)

    @property
    def scores(self) -> Sequence[float]:
        """Score of every example; NaN where there is none."""
        columns = [chunk["score"].to_pylist() for chunk in self._chunks]
        return [math.nan if score is None else score for column in columns for score in column]

    def origins(self) -> Sequence[tuple[str, int]]:
        """Return path and line of every example."""
        return [
            pair
            for chunk in self._chunks
            for pair in zip(chunk["path"].to_pylist(), chunk["line"].to_pylist(), strict=True)
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def ids_from(self, first: int) -> set[int]:
        """Return which tokens with the id ``first`` or a higher one are in some example."""
        found: set[int] = set()
        if self._largest_id is not None and self._largest_id < first:
            return found  # without a look at all tokens, which would bring the whole file into memory
        for chunk in self._chunks:
            ids = chunk["input_ids"].flatten().to_numpy()
            if len(ids) and ids.max() >= first:
                found.update(np.unique(ids[ids >= first]).tolist())
        return found

    def keys(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield a digest of the tokens of every example, and one of those before its first trained one.

        Running text has no prompt: both are of the whole of it.
        """
        for chunk in self._chunks:
            ids, masks, kinds = chunk["input_ids"], chunk["loss_mask"], chunk["kind"].to_pylist()
            tokens, trained = ids.values.to_numpy(), masks.values.to_numpy(zero_copy_only=False)
            starts = masks.offsets.to_pylist()[:-1]
            for (begin, end), start, kind in zip(
                pairwise(ids.offsets.to_pylist()), starts, kinds, strict=True
            ):
                row = tokens[begin:end]
                first = len(row) if kind == "text" else int(trained[start : start + len(row)].argmax())
                yield _digest(row), _digest(row[:first])

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        chunk, row = self._chunks[chunk_index], index - int(self._starts[chunk_index])
        return Example(
            input_ids=chunk["input_ids"][row].values.to_numpy(),
            loss_mask=chunk["loss_mask"][row].values.to_numpy(zero_copy_only=False),
            origin=Origin(path=chunk["path"][row].as_py(), line=chunk["line"][row].as_py()),
            flags=frozenset(map(RowFlag, chunk["flags"][row].as_py())),
            kind=chunk["kind"][row].as_py(),
            row=chunk["row"][row].as_py(),
        )


class PreparedDataset:
    """Training and held-out examples, plain text to mix in, and what is known about them."""

    def __init__(self, folder: Path, manifest: Manifest, tables: Mapping[str, ExampleTable]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.train = tables[TRAIN]
        self.heldout = tables[HELDOUT]
        self.text = tables[TEXT]

    def with_train(self, rows: ExampleTable) -> "PreparedDataset":
        """Return the same with other rows to train on."""
        return PreparedDataset(
            self.folder, self.manifest, {TRAIN: rows, HELDOUT: self.heldout, TEXT: self.text}
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the rows: the hash of their files."""
        return fingerprint_of(self.manifest)

    @property
    def about(self) -> AboutRows:
        """Where the rows are from, and what became of each.

        Raises:
            DataError: They are rows of earlier runs.
        """
        if not isinstance(self.manifest.about, AboutRows):
            raise DataError(f"{self.folder} holds rows of earlier runs, and not those of one data set")
        return self.manifest.about

    @property
    def about_earlier(self) -> AboutEarlier:
        """What is known of rows of earlier runs.

        Raises:
            DataError: They are others.
        """
        if not isinstance(self.manifest.about, AboutEarlier):
            raise DataError(f"{self.folder} holds no rows of earlier runs")
        return self.manifest.about

    def joined(self, replayed: ExampleTable, audit: Mapping[str, AuditSummary]) -> "PreparedDataset":
        """Return the same with training rows of earlier runs behind its own, and what became of them as ``audit`` says.

        The fingerprint stays that of its own rows.
        """
        tables = {TRAIN: self.train.joined(replayed), HELDOUT: self.heldout, TEXT: self.text}
        about = replace(self.about, audit={**self.about.audit, **audit})
        return PreparedDataset(self.folder, replace(self.manifest, about=about), tables)


class PreparedWriter:
    """Writes a prepared dataset beside its final name and renames it once it is whole.

    Use as a context manager; leaving it without ``finish`` removes what was written.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.folder = folder
        self.staging = storage.scratch_path(folder.parent, storage.TEMPORARY)
        self._schema = pa.schema(
            {
                "input_ids": pa.list_(pa.int32()),
                "loss_mask": pa.list_(pa.bool_()),
                "path": pa.string(),
                "line": pa.int64(),
                "flags": pa.list_(pa.string()),
                "kind": pa.string(),
                "score": pa.float64(),
                "row": pa.string(),
            }
        )
        self._lines: dict[str, BinaryIO] = {}  # split -> its rows as messages
        self._aside: list[BinaryIO] = []  # the same file, to write and to read
        self._pending: dict[str, list[tuple[Example, int]]] = {split: [] for split in SPLITS}
        self._largest_ids = dict.fromkeys(SPLITS, -1)
        with self._storage_errors():
            storage.make_folders(folder.parent, mode=0o700)
            storage.sweep(folder.parent)
            storage.disk.make_folder(self.staging)
            self._sinks = {
                split: storage.FileSink(storage.disk.create(self.staging / f"{split}.arrow"))
                for split in self._pending
            }
            self._writers = {
                split: pa.ipc.new_file(sink, self._schema) for split, sink in self._sinks.items()
            }

    def add(self, split: str, example: Example, *, times: int = 1) -> None:
        """Add one example to ``train``, ``heldout`` or ``text``, as often as ``times`` says.

        Raises:
            StorageError: It cannot be written.
        """
        pending = self._pending[split]
        pending.append((example, times))
        if len(pending) >= ROWS_PER_CHUNK:
            with self._storage_errors():
                self._flush(split)

    def add_messages(self, split: str, line: str) -> None:
        """Add the messages of a row; with an empty line nothing but their file.

        Raises:
            StorageError: It cannot be written.
        """
        with self._storage_errors():
            if split not in self._lines:
                self._lines[split] = storage.disk.create(messages_file(self.staging, split))
            if line:
                storage.disk.write(self._lines[split], line.encode() + b"\n")

    def put_aside(self, data: bytes) -> None:
        """Keep ``data`` on disk until it is known where it belongs, in a file without a name, which nobody else can open.

        Raises:
            StorageError: It cannot be written.
        """
        with self._storage_errors():
            if not self._aside:
                path = self.staging / "aside"
                self._aside = [storage.disk.create(path), path.open("rb")]
                storage.disk.unlink(path)
            storage.disk.write(self._aside[0], len(data).to_bytes(8, "big") + data)

    def take_back(self) -> Iterator[bytes]:
        """Yield what was put aside, in its order."""
        if not self._aside:
            return
        file = self._aside[1]
        file.seek(0)
        with self._storage_errors():
            while size := file.read(8):
                yield file.read(int.from_bytes(size, "big"))

    def finish(self, about: AboutRows | AboutEarlier) -> PreparedDataset:
        """Write the manifest, make the dataset real, and open it.

        Raises:
            StorageError: It cannot be written.
        """
        with self._storage_errors():
            self._publish(about)
        return open_prepared(self.folder)

    def _publish(self, about: AboutRows | AboutEarlier) -> None:
        files = {}
        for split, writer in self._writers.items():
            self._flush(split)
            writer.close()
            self._sinks[split].close()
            files[f"{split}.arrow"] = _stamped(self.staging / f"{split}.arrow")
        for split, file in self._lines.items():
            file.close()
            path = messages_file(self.staging, split)
            files[path.name] = _stamped(path)
        manifest = Manifest(files=files, largest_ids=self._largest_ids, about=about)
        storage.write_file(self.staging / MANIFEST, [MANIFESTS.text(manifest).encode()])
        storage.disk.sync(self.staging)
        try:
            storage.disk.rename(self.staging, self.folder)
            storage.disk.sync(self.folder.parent)
        except OSError:
            if not (self.folder / MANIFEST).is_file():
                raise
            storage.try_remove_tree(self.staging)  # another process has prepared the same data meanwhile

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            storage.try_remove_tree(self.staging)
            is_full = error.errno in storage.FULL_DISK
            raise StorageError(
                f"cannot write prepared data to {self.folder.parent}: {error.strerror or error}",
                hint=f"{'free some space there, or ' if is_full else ''}set SFT_CACHE_DIR to another folder",
            ) from error

    def _flush(self, split: str) -> None:
        pending = self._pending[split]
        # Copies stand behind a whole chunk, so that whoever looks at the first rows sees different ones.
        for round_ in range(max((times for _, times in pending), default=0)):
            self._write(split, [example for example, times in pending if times > round_])
        pending.clear()

    def _write(self, split: str, rows: Sequence[Example]) -> None:
        import pyarrow as pa

        lengths = np.array([0, *(len(row.input_ids) for row in rows)], dtype=np.int32).cumsum(dtype=np.int32)
        ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32)
        self._largest_ids[split] = max(self._largest_ids[split], int(ids.max(initial=-1)))
        columns = [
            pa.ListArray.from_arrays(lengths, ids),
            pa.ListArray.from_arrays(lengths, pa.array(np.concatenate([row.loss_mask for row in rows]))),
            pa.array([row.origin.path for row in rows], pa.string()),
            pa.array([row.origin.line for row in rows], pa.int64()),
            pa.array([sorted(row.flags) for row in rows], pa.list_(pa.string())),
            pa.array([row.kind for row in rows], pa.string()),
            pa.array([row.score for row in rows], pa.float64()),
            pa.array([row.row for row in rows], pa.string()),
        ]
        self._writers[split].write_batch(pa.record_batch(columns, schema=self._schema))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks.values():
            sink.close()
        for file in (*self._aside, *self._lines.values()):
            file.close()
        storage.try_remove_tree(self.staging)


def _stamped(path: Path) -> Stamp:
    """Sync a file that was written, and return what tells it from any other."""
    storage.disk.sync(path)
    return stamp_of(path)


def messages_file(folder: Path, split: str) -> Path:
    """Return where the rows of a split stand as messages."""
    return folder / f"{split}{_MESSAGES}"


def fingerprint_of(manifest: Manifest) -> str:
    """Return the identity of the rows that ``manifest`` stands for, whether they are kept as messages too or not."""
    files = {name: asdict(stamp) for name, stamp in manifest.files.items() if not name.endswith(_MESSAGES)}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def read_manifest(folder: Path) -> Manifest:
    """Return what stands beside prepared rows.

    Raises:
        DataError: It is missing or damaged, or of another version.
    """
    try:
        return MANIFESTS.read(folder / MANIFEST)
    except NotFoundError as error:
        raise DataError(f"{folder} is not a prepared data set: its {MANIFEST} is missing") from error


def require_unchanged(path: Path, manifest: Manifest) -> None:
    """Make sure that a file of prepared rows is as it was written.

    Raises:
        DataError: It is missing or another one.
    """
    stamp = manifest.files.get(path.name)
    if stamp is None or not path.is_file() or storage.file_sha256(path) != stamp.sha256:
        raise DataError(f"{path} is missing or was changed since it was prepared", hint="delete its folder")


def open_prepared(folder: Path) -> PreparedDataset:
    """Open a prepared dataset after checking its files against the manifest.

    Raises:
        DataError: It is incomplete or was changed.
    """
    import pyarrow as pa

    manifest = read_manifest(folder)
    tables = {}
    for split in SPLITS:
        require_unchanged(folder / f"{split}.arrow", manifest)
        table = pa.ipc.open_file(pa.memory_map(str(folder / f"{split}.arrow"))).read_all()
        tables[split] = ExampleTable(table, manifest.largest_ids.get(split))
    return PreparedDataset(folder, manifest, tables)
