"""``sft doctor``: what works here, and what does not by name."""

import json
from collections import namedtuple

from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.services import doctor

NAMES = [
    "program",
    "device",
    "precision",
    "attention",
    "compile",
    "extras",
    "disk",
    "hub",
    "model",
    "training",
]


def run(monkeypatch, tmp_path, *flags):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return CliRunner().invoke(app, ["doctor", *flags])


def test_a_machine_that_works_has_ten_lines_and_a_model_that_learned(monkeypatch, tmp_path):
    done = run(monkeypatch, tmp_path, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["failing"], list(found["findings"])) == (0, [], NAMES)
    assert found["findings"]["training"]["state"] == "works"
    assert found["findings"]["hub"] == {"state": "missing", "text": "not asked: HF_HUB_OFFLINE is set"}


def test_a_full_disk_and_a_training_that_does_not_learn_fail_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(5e8))
    monkeypatch.setattr(doctor.MasterWeights, "publish", lambda _: None)  # no step reaches the model
    done = run(monkeypatch, tmp_path)
    assert done.exit_code == 1
    assert "fails: disk, training" in done.output
    assert "does not learn" in done.output


def test_an_error_of_a_check_is_its_line_and_the_others_are_made(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(doctor, "_tiny_model", broken)
    found = json.loads(run(monkeypatch, tmp_path, "--json").stdout)
    assert found["failing"] == ["attention", "training"]
    assert found["findings"]["training"]["text"] == "RuntimeError: no kernel image is available"
