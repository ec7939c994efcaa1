"""Faults of the store of prepared data: message, exit code, and what is left behind."""

import errno
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.config.schema.data import DataSettings
from sftcli.errors import StoppedError
from sftcli.events import Event, Session
from sftcli.services.prepare.prepare import prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.cli.test_data_faults import prepared
from tests.cli.test_row_faults import tokenizer_with
from tests.support.faulty_disk import CountingDisk, FailingDisk, FullDisk
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer


def test_stop_while_preparing_leaves_nothing_and_the_next_try_is_whole(sft, rows, tiny_model):
    class StopsLate:
        asked = 0

        def requested(self) -> bool:
            self.asked += 1
            return self.asked > 1

        def save_requested(self) -> bool:
            return False

    data = DataSettings(sources=(str(rows),) * 3)
    sources = find_sources(data)

    def ignore(event: Event, /) -> None:
        pass

    with pytest.raises(StoppedError):
        prepare_data(data, sources, model_folder=tiny_model, seed=0, session=Session(ignore, StopsLate()))
    assert prepared() == []
    assert sft("prepare", rows, "--model", tiny_model)[0] == 0
    assert len(prepared()) == 1


def test_disk_that_fails_at_any_operation_is_74_and_nothing_is_left(sft, rows, tiny_model, monkeypatch):
    disk = CountingDisk()
    monkeypatch.setattr(storage, "disk", disk)
    assert sft("prepare", rows, "--model", tiny_model)[0] == 0
    (whole,) = prepared()
    golden = {path.name: path.read_bytes() for path in whole.iterdir()}
    known = set()
    operations = [at for at, (_, name) in enumerate(disk.log, 1) if name != "cache"]
    for at in operations:
        shutil.rmtree("cache/prepared", ignore_errors=True)
        monkeypatch.setattr(storage, "disk", FailingDisk(at, errno.ENOSPC))
        code, out, err = sft("prepare", rows, "--model", tiny_model)
        if code == 0:  # the failure was of a sync behind the rename, or of cleaning up
            continue
        assert (code, out) == (74, "")
        assert "cannot write prepared data to" in err
        assert "SFT_CACHE_DIR" in err
        assert [path for path in prepared() if path.name.startswith(".sft-")] == []
        monkeypatch.setattr(storage, "disk", storage.Disk())
        left = tuple(sorted(str(path) for path in Path("cache").rglob("*")))
        if left not in known:  # the next try begins from what is left; from the same it ends the same
            assert sft("prepare", rows, "--model", tiny_model)[0] == 0
            assert {path.name: path.read_bytes() for path in whole.iterdir()} == golden
        known.add(left)


def test_table_that_cannot_be_written_whole_is_74_and_nothing_is_left(sft, rows, tiny_model):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        code, out, err = sft("prepare", rows, "--model", tiny_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (code, out, prepared()) == (74, "", [])
    assert "cannot write prepared data to" in err


def test_swapped_tables_are_found_and_made_again(sft, rows, tiny_model):
    sft("prepare", rows, "--model", tiny_model)
    (folder,) = prepared()
    train, held = (folder / "train.arrow").read_bytes(), (folder / "heldout.arrow").read_bytes()
    (folder / "train.arrow").unlink()
    (folder / "train.arrow").write_bytes(held)
    (folder / "heldout.arrow").unlink()
    (folder / "heldout.arrow").write_bytes(train)
    code, _, err = sft("prepare", rows, "--model", tiny_model)
    assert code == 0
    assert "train.arrow is missing or was changed since it was prepared; preparing it again" in err
    assert (folder / "train.arrow").read_bytes() == train


@pytest.mark.parametrize("change", ["tokens", "template", "stop"])
def test_another_tokenizer_of_the_same_name_is_prepared_for_apart(sft, rows, tiny_model, change):
    model = tokenizer_with(tiny_model, CHATML)
    sft("prepare", rows, "--model", model)
    options = {
        "tokens": {"extra_special": ("<|pause|>",)},
        "template": {"template": CHATML + "{# another #}"},
        "stop": {"stop_token": "<|endoftext|>"},
    }
    build_tiny_tokenizer(model, **options[change])
    code, out, _ = sft("prepare", rows, "--model", model, "--json")
    assert (code, json.loads(out)["cached"], len(prepared())) == (0, False, 2)


def test_cache_that_cannot_be_made_is_73_for_prepare_and_names_the_variable(
    sft, rows, tiny_model, monkeypatch
):
    Path("file").touch()
    monkeypatch.setenv("SFT_CACHE_DIR", "file/cache")
    code, out, err = sft("prepare", rows, "--model", tiny_model)
    assert (code, out) == (73, "")
    assert "SFT_CACHE_DIR" in err


def test_training_without_a_cache_keeps_its_rows_in_the_run_with_one_warning(sft, rows, flags, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("SFT_CACHE_DIR", "file/cache")
    code, _, err = sft("train", "--data", rows, *flags, "--run", "one")
    assert code == 0
    assert err.count("prepared data goes to") == 1
    assert len(list(Path("runs/one/cache").iterdir())) == 1


def test_training_with_a_full_cache_disk_keeps_its_rows_in_the_run_and_finds_them_there_again(
    sft, rows, flags, monkeypatch
):
    monkeypatch.setattr(storage, "disk", FullDisk(Path("cache")))
    code, _, err = sft("train", "--data", rows, *flags, "--run", "one")
    assert code == 0, err
    assert err.count("No space left on device; prepared data goes to") == 1
    assert "SFT_CACHE_DIR" in err
    assert (prepared(), len(list(Path("runs/one/cache").iterdir()))) == ([], 1)
    code, _, err = sft("resume", "one", "--verify")
    assert "prepared data goes to" not in err  # it is there


def test_cache_follows_the_home_folder_and_can_do_without_one(sft, rows, tiny_model, monkeypatch):
    monkeypatch.delenv("SFT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setenv("HOME", "")
    code, out, _ = sft("prepare", rows, "--model", tiny_model)
    assert code == 0
    assert "caches/sft/prepared" in out
