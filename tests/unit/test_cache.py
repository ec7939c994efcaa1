import errno
import os
import time
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.cache import CACHE_HINT, cache_folder
from sftcli.errors import OutputError, StorageError
from sftcli.storage import atomic_folder

FOREIGN = (
    ".tmp-precious",
    ".trash-mine",
    ".sft-notes",
    ".sft-0123456789abcdef",
    ".sft-0123456789ABCDEF-tmp",
    ".sft-tmp-x",
)


def test_the_cache_is_private_and_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sft"


def test_an_unusable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError) as caught:
        cache_folder()
    assert "SFT_CACHE_DIR" in caught.value.hint


def test_a_folder_that_fails_halfway_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")

    def fail() -> None:
        with atomic_folder(target, hint=CACHE_HINT) as fresh:
            (fresh / "new").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_leftovers_of_killed_processes_are_removed_after_a_day(tmp_path: Path) -> None:
    old, recent = (storage.scratch_path(tmp_path, storage.TEMPORARY) for _ in range(2))
    for folder in (old, recent, *(tmp_path / name for name in FOREIGN)):
        folder.mkdir()
    for folder in (old, *(tmp_path / name for name in FOREIGN)):
        os.utime(folder, (time.time() - 2 * 86400,) * 2)
    with atomic_folder(tmp_path / "x", hint=CACHE_HINT):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([recent.name, "x", *FOREIGN])


def test_of_two_that_make_the_same_folder_the_last_one_wins(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model", hint=CACHE_HINT) as slow:
        (slow / "file").write_text("slow")
        with atomic_folder(tmp_path / "model", hint=CACHE_HINT) as fast:
            (fast / "file").write_text("fast")
        assert (tmp_path / "model" / "file").read_text() == "fast"
    assert (tmp_path / "model" / "file").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_with_a_way_out(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="is full") as caught,
        atomic_folder(tmp_path / "model", hint=CACHE_HINT),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "SFT_CACHE_DIR" in caught.value.hint
