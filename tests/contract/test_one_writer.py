"""Everything that changes a disk goes through ``storage.disk``, where a test can stop or fail it."""

import re
from pathlib import Path

import pytest

import sftcli

PACKAGE = Path(sftcli.__file__).parent
# The download runs in a process of its own that imports nothing of this package and leaves writing to the hub's client.
ELSEWHERE = {"storage.py", "hub/worker.py"}
# Streams of this process, a pipe that is opened to be let go, a nameless file that catches what a child says, and what users are told to type.
ELSE = re.compile(
    r'os\.devnull|both_ends = os\.open|\(writer, "w"|TemporaryFile\(\) as stderr|/proc/self/clear_refs|\(NEW_FOLDER\)'
)
LIBRARIES = r"\.save_pretrained\(|\bsave_(?:file|model)\(|\b(?:torch|np)\.save\("
WRITES = re.compile(
    LIBRARIES
    + r"|\.(?:write_text|write_bytes|mkdir|unlink|rmdir|rename|symlink_to|hardlink_to|touch|l?chmod)\("
    r"|\.(?:extract|extractall|to_parquet|to_csv|save_to_disk)\(|\bpa\.OSFile\(|\bmk[sd]temp\(|Temporary(?:File|Directory)\("
    r"|\.replace\([^,()=]*\)|\bopen\(.*[\"'][rbt+]*[wax][rbt+]*[\"']|\bshutil\.(?:copy|move|rmtree)"
    r"|\bos\.(?:open|remove|unlink|re(?:name|place)|mkdir|makedirs|rmdir|truncate|utime|link|symlink|chmod|write)"
)


def writers(source: str) -> list[str]:
    """Return the lines of ``source`` that change a disk by another way."""
    found, is_within = [], False
    for line in source.splitlines():
        is_within |= "disk.let_library_write(" in line
        own = re.sub(r"\b(?:storage|disk)\.\w+\(", "", line)
        if is_within:
            own = re.sub(LIBRARIES, "", own)
        is_within &= not line.rstrip().endswith((")", "),"))
        if WRITES.search(own) and not ELSE.search(own):
            found.append(line.strip())
    return found


def test_no_other_module_writes():
    paths = [path for path in PACKAGE.rglob("*.py") if not path.as_posix().endswith(tuple(ELSEWHERE))]
    found = {str(path): writers(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    ["path.open('w')", "open(p, mode='ab')", "path.write_text('x')", "torch.save(x, p)", "path.replace(target)",
     "model.save_pretrained(p)", "os.replace(a, b)", "shutil.rmtree(p)", "path.touch()"],
)  # fmt: skip
def test_each_way_to_write_is_seen(source: str):
    assert writers(source)


@pytest.mark.parametrize(
    "source",
    ["path.open('rb')", "text.replace('a', 'b')", "storage.disk.unlink(p)", "zipfile.ZipFile(p)",
     "storage.disk.let_library_write(p, lambda: model.save_pretrained(p))"],
)  # fmt: skip
def test_reading_is_not_writing(source: str):
    assert writers(source) == []
