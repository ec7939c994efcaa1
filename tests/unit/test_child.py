"""What a child meets never reaches the command: crashes, panics, endless work, endless memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftcli import child
from sftcli.cache import cache_folder
from sftcli.child import try_first
from sftcli.errors import DataError, ResourceError

WORK = "tests.support.hostile_work"


def attempt(work: str, path: Path, *, content: str = "") -> None:
    try_first(f"{WORK}:{work}", path, content or str(path), versions="1", name="it.json")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("crash", r"it.json: the library that reads it crashes \(SIGSEGV\)"),
        ("bus", r"it.json: the library that reads it crashes \(SIGBUS\)"),
        ("turn", "it.json: reading it was given up after 2 seconds"),
        ("swallow", "it.json: reading it takes more than 2 GB of memory"),
        ("swallow_guarded", "it.json: reading it takes more than 2 GB of memory"),
        ("panic", "it.json: a library fails on it: index out of bounds"),
        ("find_unfit", "it.json: it holds nothing"),
    ],
)
def test_each_way_of_failing_is_an_error_of_the_file(work, words, tmp_path, monkeypatch):
    if work == "turn":
        monkeypatch.setattr(child, "CPU_SECONDS", 2)
    with pytest.raises(DataError, match=words) as caught:
        attempt(work, tmp_path / "x")
    assert caught.value.exit_code == 65
    assert caught.value.hint
    with pytest.raises(DataError, match="it"):  # the next time as well
        attempt(work, tmp_path / "x")


def test_an_error_that_the_command_meets_as_well_is_left_to_it_and_not_remembered(tmp_path):
    attempt("refuse", tmp_path / "x")
    assert not (cache_folder() / "tried").exists()


def test_a_child_that_cannot_start_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(ResourceError, match="no_such_work"):
        attempt("no_such_work", tmp_path / "x")


def test_what_passed_is_remembered_by_its_content(tmp_path, monkeypatch):
    notes = tmp_path / "x"
    for content in ("one", "one", "two"):
        monkeypatch.setattr(child, "_passed", set())  # as in another process
        attempt("note", notes, content=content)
    assert len(notes.read_text().splitlines()) == 2
    assert len(list((cache_folder() / "tried").iterdir())) == 2


def test_without_a_place_to_remember_it_is_tried_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        monkeypatch.setattr(child, "_passed", set())
        attempt("note", tmp_path / "x")
    assert len((tmp_path / "x").read_text().splitlines()) == 2


PARENT = """
import sys
from pathlib import Path
from sftcli.child import try_first
try_first("tests.support.hostile_work:wait", Path(sys.argv[1]), "x", versions="1")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_is_left_behind(tmp_path, number):
    notes = tmp_path / "x"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(notes)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not notes.exists() or not notes.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(notes.read_text())
    parent.send_signal(number)
    assert parent.wait(timeout=60) != 0
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
