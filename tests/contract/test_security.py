"""What artefacts, caches and the network see of a user, and what foreign names can do to a terminal and to other folders."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

import sftcli
from sftcli import storage
from sftcli.cache import CACHE_HINT, cache_folder
from sftcli.errors import ConsentError, DataError
from sftcli.modeling.formats.folder_check import check_model_folder
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resuming.resume_point import clear_leftovers
from sftcli.storage import atomic_folder
from tests.contract.test_canaries import origin, place, sft  # noqa: F401 - fixtures
from tests.support.recording import RecordingSink

EVIL = "\x1b]52;c;aGFjaw==\x07\x1b[2J\x9b31m\x08"


def test_index_of_shards_that_leads_out_of_its_folder_is_refused(place):  # noqa: F811
    model = place / "model"
    (model / "model.safetensors").rename(place / "other.safetensors")
    index = {"weight_map": {"a": "../other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside of its folder"):
        check_model_folder(model)


def test_links_in_what_is_cleared_away_are_not_followed(place, tmp_path):  # noqa: F811
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("whole")
    checkpoints = place / "runs" / "exp" / "checkpoints"
    leftover = checkpoints / ".tmp-step-00000009-abcd0123"
    leftover.mkdir()
    (leftover / "inside").symlink_to(mine)
    (checkpoints / ".trash-step-00000001-abcd0123").symlink_to(mine)
    clear_leftovers(RunFolder(place / "runs" / "exp"), RecordingSink())
    assert (mine / "thesis").read_text() == "whole"
    assert not leftover.exists()
    assert not list(checkpoints.glob(".trash-*"))


def test_link_at_the_place_of_a_cached_model_is_replaced_and_its_target_left(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("whole")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(mine)
    with atomic_folder(tmp_path / "models" / "tiny", hint=CACHE_HINT) as fresh:
        storage.write_file(fresh / "config.json", [b"{}"])
    assert not (tmp_path / "models" / "tiny").is_symlink()
    assert [path.name for path in mine.iterdir()] == ["thesis"]


def test_model_that_is_left_behind_says_nothing_of_who_made_it(place):  # noqa: F811
    code, text = sft("resume", "exp")
    assert code == 0, text
    final = place / "runs" / "exp" / "final"
    secrets = [str(place), str(place.resolve()), socket.gethostname(), str(Path.home()) + "/"]
    for file in final.rglob("*"):
        content = file.read_bytes()
        assert not [word for word in secrets if len(word) > 3 and word.encode() in content], file.name
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in final.iterdir()} == {0o666 & ~umask}


def test_nothing_is_asked_of_the_network_with_a_model_that_is_here(place, monkeypatch):  # noqa: F811
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    for command in ("prepare rows.jsonl --model model", "resume exp", "eval exp", "generate Hi --checkpoint exp",
                    "train --data rows.jsonl --model model --max-steps 1 --run two", "report exp"):  # fmt: skip
        code, text = sft(*command.split())
        assert code == 0, text
    assert asked == []


def test_cache_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("SFT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_cache_of_another_user_is_refused_until_it_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SFT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    os.chown(cache_folder(), 12345, -1)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(ConsentError, match="belongs to another user") as caught:
        cache_folder()
    assert caught.value.exit_code == 77
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "sft"))
    assert cache_folder() == tmp_path / "sft"


def test_no_variable_of_the_environment_is_a_hook_for_tests():
    named = set()
    for path in Path(sftcli.__file__).parent.rglob("*.py"):
        named |= set(re.findall(r"\bSFT_[A-Z_]+", path.read_text(encoding="utf-8")))
    assert named <= {"SFT_", "SFT_CACHE_DIR", "SFT_DEBUG", "SFT_TRAINING__MAX_STEPS"}


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--data", "rows.jsonl", "--model", f"x{EVIL}"),
        ("train", "--data", f"x{EVIL}.jsonl", "--model", "model"),
        ("train", "--data", "rows.jsonl", "--model", "model", "--run", f"x{EVIL}"),
        ("train", "--preset", f"x{EVIL}"),
        ("train", "--set", f"x{EVIL}=1"),
        ("train", "--config", f"x{EVIL}.toml"),
        ("resume", f"x{EVIL}"),
        ("generate", f"Hi {EVIL}", "--checkpoint", f"x{EVIL}"),
        (f"x{EVIL}",),
    ],
    ids=lambda command: command[0] + command[-2][:9] if len(command) > 1 else "command",
)
def test_names_in_messages_cannot_command_the_terminal(place, command):  # noqa: F811
    for more in ((), ("--json",)):
        code, text = sft(*command, *more)
        assert code != 0
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\x08"}


def test_names_of_files_in_a_model_folder_cannot_command_the_terminal(place):  # noqa: F811
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / f"x{EVIL}.bin").write_bytes(b"")
    code, text = sft("train", "--data", "rows.jsonl", "--model", "model")
    assert code == 77
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\x08"}
    shutil.rmtree(place / "model")
