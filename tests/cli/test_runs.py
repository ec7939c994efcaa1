"""``sft runs``, ``sft show`` and what the shell offers after Tab, on run folders written by the real log."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.cli.options import complete
from sftcli.errors import UsageError
from sftcli.events import Event, StepDone
from sftcli.json_files import replace_json
from sftcli.services.runs.event_log import RunLog
from sftcli.services.runs.folder import RunFolder
from tests.contract.test_import_cost import HEAVY, start
from tests.support.fake_run import run_events
from tests.support.golden import assert_golden


def write_run(
    name: str, started: str, events: list[Event], *, checkpoints: tuple[int, ...] = ()
) -> RunFolder:
    run = RunFolder(Path("runs") / name)
    run.path.mkdir(parents=True)
    replace_json(run.about, {"started_at": started, "command": "sft train --preset quick"})
    with RunLog(run, every_steps=10, after_step=-1) as log:
        for event in events:
            log(event)
    for step in checkpoints:
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run, a stopped one, and one that ended before its first checkpoint."""
    monkeypatch.chdir(tmp_path)
    whole = list(run_events())
    until_30 = [event for event in whole if not isinstance(event, StepDone) or event.step <= 30]
    done = write_run("done", "2026-01-03T00:00:00+00:00", whole, checkpoints=(50, 60))
    done.final.mkdir()
    (done.final / "config.json").write_text("{}")
    write_run("half", "2026-01-02T00:00:00+00:00", until_30, checkpoints=(30,))
    write_run("none", "2026-01-01T00:00:00+00:00", whole[:2])


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.exception
    return re.sub(r"\d+d\d+h ago", "AGE ago", result.output)


@pytest.mark.usefixtures("runs")
def test_runs_and_show_say_where_each_run_stands():
    screens = [f"$ sft {' '.join(call)}\n{invoke(*call)}" for call in (["runs"], ["show"], ["show", "half"])]
    assert_golden("views/runs.txt", "\n".join(screens))


@pytest.mark.usefixtures("runs")
def test_the_folder_of_runs_is_named_as_in_every_command():
    Path("runs").rename("elsewhere")
    assert "no runs under runs" in invoke("runs")
    named = invoke("runs", "--runs", "elsewhere")
    assert "done" in named
    assert invoke("runs", "elsewhere") == named


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["done", "runs/done"])
def test_a_run_in_the_place_of_a_folder_is_named_with_the_command_that_shows_it(name: str):
    error = CliRunner().invoke(app, ["runs", name]).exception
    assert isinstance(error, UsageError)
    assert error.hint == f"one run: sft show {name}"
    invoke(*error.hint.partition("sft ")[2].split())


@pytest.mark.usefixtures("runs")
def test_scripts_get_states_steps_and_losses():
    found = json.loads(invoke("runs", "--json"))["runs"]
    assert [(run["name"], run["state"], run["step"]) for run in found] == [
        ("done", "finished", 60),
        ("half", "stopped", 30),
        ("none", "broken-off", 0),
    ]
    assert json.loads(invoke("show", "done", "--json"))["best_step"] == 60


@pytest.mark.usefixtures("runs")
def test_a_run_in_training_is_told_from_one_that_was_killed():
    from sftcli.services.runs.lock import RunLock

    with RunLock(Path("runs/half"), lambda _: None):
        assert json.loads(invoke("show", "half", "--json"))["state"] == "running"
    assert json.loads(invoke("show", "half", "--json"))["state"] == "stopped"


@pytest.mark.parametrize(
    "call",
    [
        ("eval", "fresh"),
        ("eval",),
        ("generate", "hello"),
        ("generate", "hello", "-c", "fresh"),
        ("report",),
        ("push", "me/it"),
        ("push", "me/it", "fresh"),
        ("export", "fresh", "--to", "hf", "--out", "new"),
    ],
    ids=" ".join,
)
def test_a_model_that_is_still_trained_is_not_taken_for_one_that_ended(
    call: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sftcli.services.runs.lock import RunLock

    monkeypatch.chdir(tmp_path)
    until_12 = [event for event in run_events() if not isinstance(event, StepDone) or event.step <= 12]
    run = write_run("fresh", "2026-01-01T00:00:00+00:00", until_12)
    with RunLock(run.path, lambda _: None):
        during = CliRunner().invoke(app, list(call))
    assert during.exit_code != 0
    assert "run fresh is at step 12 of 60 and still training" in str(during.exception)
    after = str(CliRunner().invoke(app, list(call)).exception)
    assert after
    assert "still training" not in after


def test_an_empty_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "sft train" in invoke("runs")
    assert json.loads(invoke("runs", "--json"))["runs"] == []


@pytest.mark.usefixtures("runs")
def test_tab_offers_what_can_stand_there():
    for name in ("rows.jsonl", "rows.csv.gz", "notes.txt", "model.gguf", "my.toml"):
        Path(name).touch()
    assert "gpu" in dict(complete.presets("g"))
    assert dict(complete.settings("training.learning_rate"))["training.learning_rate="]
    assert complete.settings("training.schedule=co") == [
        "training.schedule=cosine",
        "training.schedule=constant",
    ]
    assert complete.settings("data.allow_leak=") == ["data.allow_leak=true", "data.allow_leak=false"]
    assert complete.runs("h") == ["half"]
    assert complete.models("d") == ["done"]
    assert complete.models("runs/done/ch") == [
        "runs/done/checkpoints/step-00000050",
        "runs/done/checkpoints/step-00000060",
        "runs/done/checkpoints/",
    ]
    assert complete.models("m") == ["model.gguf"]
    assert complete.rows("r") == ["rows.csv.gz", "rows.jsonl", "runs/"]
    assert complete.config_files("") == ["my.toml", "runs/"]
    assert complete.rows("nowhere/") == []


def ask_shell(shell: str, line: str) -> str:
    """Return what the program tells ``shell`` when Tab is pressed at the end of ``line``."""
    asked = {
        "_SFT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [sys.executable, "-m", "sftcli"]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_asks_the_real_program(shell):
    answer = ask_shell(shell, "sft resume ha")
    assert "half" in answer
    assert "done" not in answer


def test_the_help_of_a_name_stays_on_its_line():
    assert [line for line in ask_shell("zsh", "sft train --preset g").splitlines() if ":" not in line] == []


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("arguments", [["runs"], ["show", "half"], []])
def test_a_look_loads_nothing_heavy(arguments):
    code, modules = start(*arguments)
    assert code == 0
    assert not modules & HEAVY
