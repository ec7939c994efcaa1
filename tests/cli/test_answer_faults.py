"""Faults that meet ``generate``, ``eval``, ``export`` and ``report``: the message, the exit code, and what is left behind."""

import errno
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sftcli.modeling.hub.snapshot import Patience
from tests.support.fake_hub import FakeHub
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt
from tests.support.tiny_tokenizer import build_tiny_tokenizer

REPO = Path(__file__).parents[2]
OSC = "\x1b]52;c;aGk=\x07[/] [bold]"
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the finished run ``first``."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        assert train(settings_of(folder, tiny_model, "run.name=first"), StopAtStep(99)).final is not None
    return folder / "runs"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "held.jsonl", count=3)


def commands(model: Path, rows: Path) -> dict[str, list[object]]:
    return {
        "generate": ["generate", "hello", "-c", model, "--max-new-tokens", 3],
        "eval": ["eval", model, "--data", rows, "--no-base", "--max-rows", 1],
        "export": ["export", model, "--to", "hf", "--out", "out"],
    }


@pytest.mark.parametrize("command", ["generate", "eval", "export"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "there is no tokenizer.json in"),
        ("model.safetensors", "model.safetensors is missing"),
    ],
)
def test_file_that_a_model_lacks_is_named(sft, tiny_model, rows, tmp_path, command, name, words):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / name).unlink()
    code, out, err = sft(*commands(model, rows)[command])
    assert (code, out) == (66, "")
    assert words in err
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_answers_with_one_that_is_named(sft, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    _, _, err = sft("generate", "hello", "-c", model)
    assert "--tokenizer DIR" in err
    code, _, _ = sft("generate", "hello", "-c", model, "--tokenizer", tiny_model, "--max-new-tokens", 2)
    assert code == 0


@pytest.mark.parametrize("command", ["generate", "eval", "export"])
def test_checkpoint_needs_only_weights_and_tokenizer_to_answer(sft, finished, rows, tmp_path, command):
    model = next((finished / "first" / "checkpoints").iterdir())
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for name in ("optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"):
        (bare / name).unlink()
    assert sft(*commands(bare, rows)[command])[0] == 0


@pytest.mark.parametrize("name", ["run.json", "data.json", "config.toml"])
def test_model_in_a_run_whose_files_are_damaged_is_used_with_a_warning(sft, finished, rows, tmp_path, name):
    run = Path(shutil.copytree(finished / "first", tmp_path / "runs" / "first"))
    (run / name).write_text("{", encoding="utf-8")
    for command, words in commands(run / "final", rows).items():
        code, _, err = sft(*words)
        assert code == 0, (command, err)
        assert f"{run / name}" in err
        assert "is used without what its run says of it" in err
    code, _, err = sft("generate", "hello", "-c", run / "final", "--trust-remote-code")
    assert code == 65
    assert "which code" in err


def test_run_whose_record_is_damaged_names_a_model_that_can_be_used(sft, finished, rows, tmp_path):
    run = Path(shutil.copytree(finished / "first", tmp_path / "runs" / "first"))
    (run / "run.json").write_text("", encoding="utf-8")
    for words in commands(run, rows).values():
        code, out, err = sft(*words)
        assert (code, out) == (65, "")
        assert "final/" in err
    assert not Path("out").exists()


def test_one_damaged_run_does_not_stop_commands_on_others(sft, finished, tmp_path):
    """It looks like the newest one, as a full disk leaves it."""
    runs = Path(shutil.copytree(finished, tmp_path / "runs"))
    bad = Path(shutil.copytree(runs / "first", runs / "zz-bad"))
    (bad / "run.json").write_text("", encoding="utf-8")
    code, out, err = sft("runs")
    assert code == 0, err
    assert "zz-bad" in out and "damaged" in out  # noqa: PT018
    for words in (
        ["show"], ["generate", "hello", "--max-new-tokens", 2], ["eval", "--no-base", "--max-rows", 1], ["report", "--out", "page.html"],
    ):  # fmt: skip
        code, out, err = sft(*words)
        assert code == 0, (words, err)
        assert "zz-bad" not in out + err
    assert "zz-bad" not in Path("page.html").read_text(encoding="utf-8")
    code, _, err = sft("resume")
    assert code == 66
    assert "there is no unfinished run" in err


def test_a_log_that_may_not_be_read_is_said_of_its_run_alone(sft, finished, tmp_path, monkeypatch):
    runs = Path(shutil.copytree(finished, tmp_path / "runs"))
    locked = Path(shutil.copytree(runs / "first", runs / "locked")) / "events.jsonl"
    opened = Path.open

    def refusing(path: Path, *arguments, **options):
        if path.name == "events.jsonl" and path.parent.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)  # the one who runs tests may be allowed all
    code, out, err = sft("runs")
    assert code == 0, err
    assert "first" in out and "locked" in out  # noqa: PT018
    code, _, err = sft("show", "locked")
    assert code == 74
    assert f"{locked.relative_to(tmp_path)} cannot be read: Permission denied" in err


@pytest.mark.parametrize("command", ["generate", "eval", "export"])
def test_without_network_a_model_that_is_not_here_is_69_and_nobody_is_asked(
    sft, tiny_model, rows, monkeypatch, command
):
    with FakeHub("owner/name", tiny_model).serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code, out, err = sft(*commands(Path("owner/name"), rows)[command])
        assert (code, out, hub.requests) == (69, "", [])
    assert "owner/name" in err
    assert "help: " in err


@pytest.mark.parametrize(
    ("status", "error", "code"), [(403, "GatedRepo", 77), (401, "GatedRepo", 77), (503, "", 69)]
)
def test_hub_that_refuses_or_fails_has_its_exit_code_and_keeps_the_token(
    sft, tiny_model, monkeypatch, status, error, code, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARYCANARYCANARYCANARY")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("sftcli.modeling.locate.locate.Patience", lambda: Patience(answer_seconds=2.0))
    with FakeHub("owner/name", tiny_model, status=status, error_code=error).serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found, out, err = sft("generate", "hello", "-c", "owner/name")
    assert (found, out) == (code, "")
    assert "CANARY" not in err


def test_a_slow_start_of_the_process_that_asks_is_no_silence_of_the_hub(
    sft, tiny_model, monkeypatch, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(1.5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("sftcli.modeling.locate.locate.Patience", lambda: Patience(answer_seconds=1.5))
    with FakeHub("owner/name", tiny_model, status=403, error_code="GatedRepo").serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert sft("generate", "hello", "-c", "owner/name")[0] == 77


def test_text_that_commands_a_terminal_is_shown_and_not_obeyed(sft, tiny_model, tmp_path):
    hostile = write_rows(tmp_path / "hostile.jsonl", count=1)
    hostile.write_text(json.dumps({"question": OSC, "answer": OSC}) + "\n", encoding="utf-8")
    code, out, err = sft("eval", tiny_model, "--data", hostile, "--no-base")
    assert code == 0
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    code, _, err = sft("generate", OSC, "-c", f"{OSC}model")
    assert code == 66
    assert "\x1b" not in err
    code, out, err = sft("export", tiny_model, "--to", "hf", "--out", f"{OSC.replace('/', '_')}out")
    assert code == 0
    assert "\x1b" not in out + err


NAMES = ["with space", "quo\"te's", "ünïcödé ☃", "-dash", "n" * 255]


@pytest.mark.parametrize("name", NAMES, ids=["space", "quotes", "unicode", "dash", "long"])
def test_models_and_outputs_of_any_name_work(sft, tiny_model, tmp_path, name):
    model = Path(shutil.copytree(tiny_model, tmp_path / "in" / name))
    out = tmp_path / "out" / name
    assert sft("export", model, "--to", "hf", "--out", out)[0] == 0
    assert sft("generate", "hello", "-c", out, "--max-new-tokens", 2)[0] == 0
    prompts = out / "prompts.txt"
    prompts.write_text("hello\n", encoding="utf-8")
    assert sft("generate", "--file", prompts, "--out", out / "answers.jsonl", "-c", out)[0] == 0


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, list[object]]:
    """Return how each kind of model file is named to ``generate``."""
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", template=None)
    return {
        "pt": [build_tiny_pt(tmp_path / "a.pt"), "--tokenizer", tokenizer],
        "gguf": [build_tiny_gguf(build_tiny_model(tmp_path / "tiny"), tmp_path / "a.gguf")],
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers, about its GGUF reader
@pytest.mark.parametrize("kind", ["pt", "gguf"])
def test_model_files_answer_a_file_a_person_and_an_evaluation(sft, kinds, rows, tmp_path, monkeypatch, kind):
    model = kinds[kind]
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    ask = ("--checkpoint", *model, "--max-new-tokens", 3)
    assert sft("generate", "--file", "prompts.txt", "--out", "answers.jsonl", *ask)[0] == 0
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    with (tmp_path / "typed").open("w+", encoding="utf-8") as typed:
        typed.write("hello\n/quit\n")
        typed.seek(0)
        monkeypatch.setattr("sys.stdin", typed)
        assert sft("generate", "--chat", *ask)[0] == 0
    assert sft("eval", *model, "--data", rows, "--no-base", "--max-rows", 1)[0] == 0


def run(*arguments: object, shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own; ``shell`` is put behind the command."""
    command = shlex.join([sys.executable, "-m", "sftcli", *map(str, arguments)])
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SFT_CACHE_DIR", "HF_HUB_OFFLINE")}
    base = {"PYTHONPATH": str(REPO), "LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {shell}"],
        env=kept | base | env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_off_a_terminal_there_is_no_escape_in_any_command(finished, tmp_path):
    """One process a command: on a pipe, in the C locale, with color forced off by its variable."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1"}
    for command in (
        ["generate", "☃ hello", "--runs", finished, "--max-new-tokens", 3],
        ["report", "--runs", finished, "--out", tmp_path / "ü.html"],
    ):
        done = run(*command, **plain)
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"\r" not in done.stdout + done.stderr
        assert b"UnicodeEncodeError" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code"), [("| head -c 1", 141), ("> /dev/full", 74), (">&-", 141), ("<&-", 0)]
)
def test_answer_whose_reader_leaves_or_whose_disk_is_full(tiny_model, shell, code):
    done = run("generate", "hello", "-c", tiny_model, "--max-new-tokens", 400, "--quiet", shell=shell)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.slow
def test_chat_without_a_person_ends_and_never_asks(tiny_model):
    done = run("generate", "--chat", "-c", tiny_model)
    assert done.returncode == 0, done.stderr
    closed = run("generate", "-", "-c", tiny_model, shell="<&-")
    assert closed.returncode == 2
    assert b"standard input is closed" in closed.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "styled"),
    [("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False)],
)
def test_colors_of_scores_follow_the_terminal(tiny_model, rows, variable, value, styled):
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "sftcli",
        "eval",
        str(tiny_model),
        "--data",
        str(rows),
        "--base",
        str(tiny_model),
    ]
    env = {name: os.environ[name] for name in ("PATH", "HOME", "SFT_CACHE_DIR", "HF_HUB_OFFLINE")}
    env |= {
        "PYTHONPATH": str(REPO),
        "TERM": "xterm-256color",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        variable: value,
    }
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=follower, stderr=subprocess.DEVNULL, env=env
    )
    os.close(follower)
    sent = b""
    try:
        while data := os.read(leader, 65536):
            sent += data
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    os.close(leader)
    assert process.wait(timeout=120) == 0
    assert (b"\x1b[" in sent) == styled
