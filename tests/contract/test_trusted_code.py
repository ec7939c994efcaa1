"""Code of a model runs only for who typed the flag and pinned the commit, and then it is told and recorded."""

import json
from pathlib import Path

import pytest

from tests.contract.test_canaries import sft
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.forked import run_forked
from tests.support.runs import write_rows
from tests.support.tiny_model import build_tiny_model

REPO = "owner/own-code"
TRUST = ("--trust-remote-code", "--set", f"model.revision={COMMIT}")
CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(os.environ["TRACE"]).touch()

class OwnConfig(LlamaConfig):
    model_type = "own-code"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-code",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_rows(tmp_path / "rows.jsonl", 15)
    monkeypatch.chdir(tmp_path)
    for name, value in (("TRACE", "trace"), ("HF_HOME", "hf"), ("SFT_CACHE_DIR", "cache")):
        monkeypatch.setenv(name, str(tmp_path / value))
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    return tmp_path


@pytest.fixture
def hub(place, monkeypatch):
    with FakeHub(REPO, place / "model").serving() as serving:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", serving.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield serving


def train(*more: object, model: object = REPO, run: str = "exp") -> tuple[int, str]:
    return sft("train", "--data", "rows.jsonl", "--model", model, "--run", run, "--max-steps", 2,
               "--set", "training.batch_size=2", *more)  # fmt: skip


def test_without_the_flag_the_code_is_neither_fetched_nor_run(place, hub):
    code, text = train()
    assert code == 77
    assert "auto_map" in text
    assert "--trust-remote-code" in text
    assert not [path for path in hub.requests if path.endswith(".py")]
    assert not (place / "trace").exists()


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_flag_without_a_full_commit_is_refused(place, revision):
    code, text = train(
        "--trust-remote-code", *(() if revision is None else ("--set", f"model.revision={revision}"))
    )
    assert code == 2
    assert "full commit of 40 hex digits" in text
    assert not (place / "trace").exists()


@pytest.mark.parametrize("way", ["file", "environment"])
def test_trust_is_typed_by_a_person_and_comes_from_nowhere_else(place, monkeypatch, way):
    more: tuple[object, ...] = ("--set", f"model.revision={COMMIT}")
    if way == "environment":
        monkeypatch.setenv("SFT_MODEL__TRUST_REMOTE_CODE", "true")
    else:
        Path("own.toml").write_text("[model]\ntrust_remote_code = true\n")
        more += ("--config", "own.toml")
    code, text = train(*more)
    assert code == 2
    assert "can be set on the command line only" in text
    assert not (place / "trace").exists()


def test_code_of_a_local_folder_is_refused_with_the_flag_too(place):
    assert train(*TRUST, model=place / "model")[0] == 2
    assert train(model=place / "model", run="other")[0] == 77
    assert not (place / "trace").exists()


def test_code_of_another_repository_is_refused_with_the_flag_too(place, hub):
    config = json.loads((place / "model" / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other/repo--own.OwnModel"
    (place / "model" / "config.json").write_text(json.dumps(config))
    code, text = train(*TRUST)
    assert code == 77
    assert "another repository (other/repo--own.OwnModel)" in text
    assert not (place / "trace").exists()


def test_trusted_code_is_told_recorded_and_asked_for_again_on_resume(place, hub):
    def work() -> None:
        code, text = train(*TRUST)
        assert code == 0, text
        told = " ".join(text.split())
        assert f"code of {REPO} at {COMMIT} runs with your permissions" in told
        assert "own.py" in told
        assert (place / "trace").exists()

    assert run_forked(work) == 0
    run = place / "runs" / "exp"
    trusted = json.loads((run / "run.json").read_text())["trusted_code"]
    assert (trusted["model"], trusted["commit"], trusted["files"]) == (REPO, COMMIT, "own.py")
    assert "trust" not in (run / "config.toml").read_text()
    assert (run / "final" / "own.py").read_text() == CODE
    (place / "trace").unlink()
    (run / "final" / "config.json").unlink()  # as if it had been stopped before the end
    code, text = sft("resume", "exp")
    assert code == 77, text
    assert not (place / "trace").exists()
    assert run_forked(lambda: _resume_with_trust(place)) == 0


def _resume_with_trust(place: Path) -> None:
    code, text = sft("resume", "exp", "--trust-remote-code")
    assert code == 0, text
    assert (place / "trace").exists()


ASK = ("generate", "Hello?", "--max-new-tokens", "2")


def test_what_came_of_it_is_asked_and_scored_only_with_the_flag_typed_again(place, hub):
    def work() -> None:
        assert train(*TRUST, "--set", "data.heldout_fraction=0.2")[0] == 0

    assert run_forked(work) == 0
    (place / "trace").unlink()
    for command in ((*ASK, "--base"), ("eval", "exp", "--max-rows", "1")):
        code, text = sft(*command)
        assert code == 77, text
        assert "--trust-remote-code again" in " ".join(text.split())
        assert not (place / "trace").exists()

        def trusting(command=command) -> None:
            code, text = sft(*command, "--trust-remote-code")
            assert code == 0, text
            assert (
                f"code of {REPO} at {COMMIT}, copied to runs/exp/final, runs with your permissions"
                in " ".join(text.split())
            )

        assert run_forked(trusting) == 0
        (place / "trace").unlink()


def test_code_beside_a_tuned_model_that_is_not_what_was_trained_with_is_refused(place, hub):
    def work() -> None:
        assert train(*TRUST)[0] == 0

    assert run_forked(work) == 0
    (place / "trace").unlink()
    with (place / "runs" / "exp" / "final" / "own.py").open("a") as file:
        file.write("# another\n")
    code, text = sft(*ASK, "--trust-remote-code")
    assert code == 77, text
    assert "is not what ran when the model was trained" in " ".join(text.split())
    assert not (place / "trace").exists()


def test_code_of_a_model_that_no_run_has_made_is_refused_with_the_flag_too(place):
    code, text = sft(*ASK, "--trust-remote-code", "--checkpoint", "model")
    assert code == 2, text
    assert not (place / "trace").exists()


def test_trusted_code_runs_below_an_adapter_too_and_does_not_travel_with_it(place, hub):
    def work() -> None:
        code, text = train(*TRUST, "--lora")
        assert code == 0, text
        assert (place / "trace").exists()

    assert run_forked(work) == 0
    run = place / "runs" / "exp"
    assert json.loads((run / "run.json").read_text())["trusted_code"]["files"] == "own.py"
    assert (run / "final" / "adapter_model.safetensors").is_file()
    assert not list((run / "final").glob("*.py"))
    (place / "trace").unlink()
    (run / "final" / "adapter_config.json").unlink()  # as if it had been stopped before the end
    code, text = sft("resume", "exp")
    assert code == 77, text
    assert not (place / "trace").exists()
    assert run_forked(lambda: _resume_with_trust(place)) == 0
    (place / "trace").unlink()
    code, text = sft(*ASK, "--checkpoint", "runs/exp")
    assert code == 77, text
    assert run_forked(lambda: _ask_with_trust(place)) == 0


def _ask_with_trust(place: Path) -> None:
    code, text = sft(*ASK, "--checkpoint", "runs/exp", "--trust-remote-code")
    assert code == 0, text
    assert (place / "trace").exists()
