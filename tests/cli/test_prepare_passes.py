"""How often a source is read: once for its fingerprint, once for its rows, and never more, whatever is asked of the rows."""

import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.data.reading import blocks
from sftcli.events import NeverStop, Session
from sftcli.services.prepare import prepare
from sftcli.services.prepare.prepare import PreparedData, prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.support.recording import RecordingSink

ROWS = [{"question": f"Is {n} a number? {n * 7919:x}", "answer": f"yes, it is {n}"} for n in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def lay(name: str) -> Path:
    """Write ``ROWS`` in the form that the name says, and return the path."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES, 0))
    elif name.endswith(".zst"):
        path.write_bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".csv"):
        path.write_text("question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in ROWS))
    elif name.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(ROWS)
        pyarrow.parquet.write_table(table, name, compression="none", row_group_size=100, use_dictionary=False)
    else:
        path.write_bytes(LINES)
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", "cache")


def prepared(model: Path, **settings: object) -> PreparedData:
    data = DataSettings(**settings)
    session = Session(RecordingSink(), NeverStop())
    return prepare_data(data, find_sources(data), model_folder=model, seed=0, session=session, workers=0)


class ReadBytes:
    """Counts what is read of the files below the current folder, in whatever way Python reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, int] = {}
        plain = Path.open

        def opened(path: Path, *args: object, **options: object):
            file = plain(path, *args, **options)
            if not path.is_absolute() and "cache" not in path.parts and file.mode == "rb":
                return _Counted(file, path, self.of)
            return file

        monkeypatch.setattr(Path, "open", opened)

    def times(self) -> dict[str, float]:
        """Return how often each file was read."""
        return {name: round(count / Path(name).stat().st_size, 2) for name, count in self.of.items()}


class _Counted:
    def __init__(self, file, path: Path, of: dict[str, int]) -> None:
        self._file, self._name, self._of = file, str(path), of

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._of[self._name] = self._of.get(self._name, 0) + len(data)
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name: str):
        assert name in ("seek", "tell", "close", "fileno", "closed", "mode", "name", "flush"), name
        return getattr(self._file, name)


@pytest.mark.parametrize("rows", ["", ":50", ":20%"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder/a.jsonl"]
)
@pytest.mark.parametrize("block", [1 << 20, 4096])
def test_source_is_read_twice_and_once_where_its_rows_are_kept(tiny_model, monkeypatch, name, rows, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    path = lay(name)
    source = f"{path.parent if name.startswith('folder') else path}{rows}"
    counted = ReadBytes(monkeypatch)
    prepared(tiny_model, sources=(source,))
    assert list(counted.times()) == [name]
    least, most = (
        (1.9, 2.0) if not name.endswith(".parquet") else (1.0, 2.0 + 14 * block / path.stat().st_size)
    )
    assert least <= counted.times()[name] <= most
    before = counted.of[name]
    assert prepared(tiny_model, sources=(source,)).is_cached
    assert counted.of[name] - before == path.stat().st_size


@pytest.mark.parametrize("side", ["heldout_sources", "text_sources"])
def test_named_held_out_rows_and_plain_text_cost_no_further_reading(tiny_model, monkeypatch, side):
    lay("a.jsonl")
    key = "question" if side == "heldout_sources" else "text"
    rows = [{key: f"other {n}?", **({"answer": "no"} if key == "question" else {})} for n in range(200)]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = ReadBytes(monkeypatch)
    prepared(tiny_model, sources=("a.jsonl",), **{side: ("b.jsonl",)})
    assert counted.times() == {"a.jsonl": 2.0, "b.jsonl": 2.0}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_byte_that_changes_between_the_two_is_refused_by_name_though_size_and_time_stay(
    tiny_model, monkeypatch, name
):
    if name.endswith(".arrow"):
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.OSFile(name, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        lay(name)
    looked = prepare._open_cached

    def change(folder, emit):
        found = looked(folder, emit)
        path, stat = Path(name), Path(name).stat()
        data = path.read_bytes()
        at = data.find(b"it is 300")
        if at < 0:  # it was changed at the first look
            return found
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"It")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return found

    monkeypatch.setattr(prepare, "_open_cached", change)
    with pytest.raises(prepare.DataError, match=f"^{name}: changed while being prepared; nothing was saved$"):
        prepared(tiny_model, sources=(name,))
    assert list(Path("cache/prepared").iterdir()) == []
