"""Kept rows as messages in JSON lines, in their order: any format in, one format out."""

from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from sftcli import storage
from sftcli.data.prepared.store import HELDOUT, TRAIN, PreparedDataset, messages_file
from sftcli.errors import DataError, OutputError
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
    sources = {split: messages_file(dataset.folder, split) for split in _NAMES}
    for path in sources.values():
        kept = dataset.manifest["files"]
        assert isinstance(kept, dict)
        if not path.is_file() or storage.file_sha256(path) != kept.get(path.name, {}).get("sha256"):
            raise DataError(
                f"{path} is missing or was changed since it was prepared", hint="delete its folder"
            )
    try:
        if out.suffix == JSON_LINES:
            with storage.whole_file(out, hint=_HINT) as fresh:
                _join(list(sources.values()), fresh)
            return
        with storage.atomic_folder(out, hint=_HINT) as folder:
            for split, name in _NAMES.items():
                if split == TRAIN or sources[split].stat().st_size:
                    _join([sources[split]], folder / name)
            write_json(folder / "audit.json", dataset.about)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"cannot make {out}: {error.strerror}", hint=_HINT) from error


def _join(sources: list[Path], target: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(source.open("rb")) for source in sources]
        storage.write_file(target, chain.from_iterable(map(storage.chunks, files)))
