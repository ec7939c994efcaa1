"""Small files that would grow without bound are refused in bounded time and memory (the limit is that of the system)."""

import gzip
import json
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.data.reading import text_lines as textlines
from sftcli.errors import SftError
from sftcli.events import NeverStop, Session
from sftcli.json_files import read_json
from sftcli.modeling.formats.folder_check import check_model_folder
from sftcli.modeling.formats.pt_file import read_pt
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.services.prepare.prepare import PreparedData, prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.support.forked import run_forked
from tests.support.recording import RecordingSink
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt

ROOM = 600 << 20  # bytes that a reader may take beside what the process has


def done_in_bounds(work, room: int = ROOM) -> None:
    """Run ``work`` in a child that may not take more than ``room``, and 10 s of processor time."""

    def bounded() -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        work()

    assert run_forked(bounded) == 0


def refused_in_bounds(read, words: str, room: int = ROOM) -> None:
    """See that ``read`` refuses what it reads, within the bounds of ``done_in_bounds``."""

    def work() -> None:
        with pytest.raises(SftError, match=words) as caught:
            read()
        assert caught.value.exit_code == 65

    done_in_bounds(work, room)


def read_rows(path: Path) -> None:
    with path.open("rb") as packed:
        for _ in textlines.text_lines(textlines.unpacked(packed, path), path.name):
            pass


def sparse(path: Path, size: int, head: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model")


def test_header_of_a_hundred_megabytes_is_not_parsed(folder):
    header = struct.pack("<Q", 100 << 20) + b'{"'
    sparse(folder / "model.safetensors", (100 << 20) + 8, header)
    refused_in_bounds(lambda: check_model_folder(folder), "header of 100 MB")


def test_header_that_is_longer_than_its_file_is_not_believed(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused_in_bounds(lambda: check_model_folder(folder), "cut off")


def test_half_a_million_tensors_are_not_taken_in(folder):
    names = ",".join(f'"{n}":0' for n in range(500_000)).encode()
    header = b"{" + names + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused_in_bounds(lambda: check_model_folder(folder), "500000 tensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_of_a_gigabyte_are_not_read(folder, name):
    sparse(folder / name, 1 << 30)
    refused_in_bounds(lambda: (read_json(folder / "config.json"), check_model_folder(folder)), "1024 MB")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_of_a_gigabyte_are_not_read(folder, name):
    sparse(folder / name, 1 << 30)
    refused_in_bounds(lambda: read_tokenizer_files(folder), "1024 MB")


def test_settings_that_nest_without_end_are_an_error(folder):
    (folder / "config.json").write_text("[" * 1_000_000)
    refused_in_bounds(lambda: read_json(folder / "config.json"), "not valid JSON")


@pytest.mark.parametrize("line", [b" " * 255 + b"\n", b"0" * 256], ids=["lines", "one line"])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_rows_that_grow_a_hundredfold_and_more_are_refused(tmp_path, packing, line):
    path = tmp_path / f"rows.jsonl.{packing}"
    block = line * (1 << 12)
    if packing == "gz":
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(200):
                file.write(block)
    else:
        import pyarrow as pa

        with pa.output_stream(str(path), compression="zstd") as file:
            for _ in range(200):
                file.write(block)
    assert path.stat().st_size < 3 << 20
    refused_in_bounds(lambda: read_rows(path), "x its size|longer than 64 MB")


def test_packed_rows_as_people_have_them_are_read(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for n in range(20_000):
            file.write(json.dumps({"question": "What is it?", "answer": f"It is {n}."}) + "\n")
    read_rows(path)


def test_compressed_archive_of_tensors_is_not_unpacked(tmp_path):
    small = build_tiny_pt(tmp_path / "small.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, np.zeros(64 << 20, np.uint8).data if "/data/0" in name else old.read(name))
    assert bomb.stat().st_size < 8 << 20
    refused_in_bounds(lambda: read_pt(bomb), "compressed")


GOOD = b'{"question": "Is 1 a number?", "answer": "yes"}\n'


def prepared(rows: Path, model: Path) -> PreparedData:
    data = DataSettings(sources=(str(rows),), heldout_fraction=0)
    sources, ignore = find_sources(data), RecordingSink()
    return prepare_data(data, sources, model_folder=model, seed=0, session=Session(ignore, NeverStop()))


def test_row_of_ten_megabytes_is_left_out_in_bounded_memory_and_time(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(GOOD + GOOD.replace(b"Is 1", b"Is it? " * 1_500_000) + GOOD)

    def work() -> None:
        audit = prepared(rows, folder).audit["train"]
        assert (audit.kept, audit.rejected) == (2, {"too-long": 1})

    done_in_bounds(work)


@pytest.mark.parametrize(
    ("hostile", "size", "words"),
    [
        (b'{"question": ' + b"[" * 100_000, 0, "rows.jsonl:2"),
        (b'{"question": "', ROOM // 2 + (32 << 20), "rows.jsonl:2"),
    ],
    ids=["nested 100 000 deep", "a line larger than the room"],
)
def test_hostile_rows_are_refused_in_bounded_memory_and_time(folder, tmp_path, hostile, size, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(GOOD + hostile)
    if size:
        with rows.open("r+b") as file:
            file.truncate(size)
    refused_in_bounds(lambda: prepared(rows, folder), words, room=ROOM // 2)
