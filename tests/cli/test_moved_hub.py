"""A hub model whose name means other weights by the time that a run goes on or is scored."""

import json
import shutil
from pathlib import Path

import pytest

from sftcli.events import Session
from sftcli.services.train.resume import ResumeRequest, resume_training
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEWER = "abcdef" * 6 + "abcd"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub("owner/name", build_tiny_model(tmp_path / "model")).serving() as serving:
        for name, value in (
            ("HF_ENDPOINT", serving.url),
            ("NO_PROXY", "127.0.0.1"),
            ("HF_HOME", tmp_path / "hf"),
        ):
            monkeypatch.setenv(name, str(value))
        yield serving


def test_run_of_a_branch_goes_on_and_is_scored_with_the_commit_that_it_started_from(sft, hub, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 15)
    short = ("model.revision=main", "training.max_steps=2", "training.eval_every_steps=0", "run.name=cut")
    train(settings_of(tmp_path, Path("owner/name"), *short), StopAtStep(1))
    runs = tmp_path / "runs"
    base = json.loads((runs / "cut" / "run.json").read_text())["base"]
    assert (base["name"], base["revision"]) == ("owner/name", COMMIT)

    hub.earlier[COMMIT] = hub.folder
    hub.folder, hub.commit = build_tiny_model(tmp_path / "newer", seed=1), NEWER
    shutil.rmtree(tmp_path / "hf")  # another machine
    flag = StopAtStep(9)
    outcome = resume_training(
        ResumeRequest(root=runs, run="cut"), Session(flag, flag)
    )  # other weights are refused
    assert outcome.step == 2

    shutil.rmtree(tmp_path / "hf")
    code, _, err = sft("eval", "cut", "--max-rows", 1)
    assert code == 0, err
    assert f"owner/name at {COMMIT[:8]}" in err
    assert not [path for path in hub.requests if NEWER in path]
