"""``source.json`` in a model folder of the cache: what it was made of, and how large its files are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sftcli import storage
from sftcli.own_files import OwnFile
from sftcli.paths import PathText

SOURCE_FILE = "source.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSource:
    """What a folder was made of: a GGUF file, a ``.pt`` file, or a model with more tokens. A part that is "" or 0 is of another kind."""

    files: Mapping[str, int]  # name -> bytes
    gguf: PathText = ""
    gguf_sha256: str = ""
    dtype: str = ""
    exact: bool = False  # it holds the numbers of its file; older folders were all rounded
    pt: PathText = ""
    pt_sha256: str = ""
    model: PathText = ""
    ids: Mapping[str, int] = field(default_factory=dict)  # of the new tokens
    rows: int = 0  # of the embeddings
    rows_before: int = 0

    def fault(self, folder: Path) -> str:
        """Say which file is not as it was written; nothing where all are."""
        for name, size in self.files.items():
            path = folder / name
            if name != Path(name).name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has another size"
        return ""


SOURCES = OwnFile(form=CachedSource, hint="delete the folder: it is made again")


def whole_source(folder: Path) -> CachedSource | None:
    """Return what ``folder`` says it was made of; None where a file is missing or has another size."""
    found = SOURCES.find_whole(folder / SOURCE_FILE)
    return None if found is None or found.fault(folder) else found


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files in ``folder`` by name."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def write_source(folder: Path, source: CachedSource) -> None:
    """Write what a new ``folder`` was made of; it comes last."""
    storage.write_file(folder / SOURCE_FILE, [SOURCES.text(source).encode()])
