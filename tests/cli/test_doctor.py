"""``sft doctor``: what works here, and what does not by name."""

import json
import socket
from collections import namedtuple

import pytest
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
    make = doctor.make_optimizer
    still = {"learning_rate": 0.0}  # no step changes a weight
    monkeypatch.setattr(doctor, "make_optimizer", lambda w, s: make(w, s.model_copy(update=still)))
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


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_is_forbidden_is_not_asked(monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    assert doctor._hub() == (doctor.State.MISSING, f"not asked: {variable} is set")


def test_the_hub_that_is_asked_is_the_one_that_is_named(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{place}/mirror/")
        assert doctor._hub() == (doctor.State.WORKS, f"{place} can be reached")
    monkeypatch.setenv("HF_ENDPOINT", "hub")
    state, text = doctor._hub()
    assert (state, "HF_ENDPOINT is 'hub'" in text) == (doctor.State.FAILS, True)
