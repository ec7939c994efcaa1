import json
from pathlib import Path

import pytest

from sftcli.cli import app
from tests.support.printed import faults_in
from tests.support.tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_pictures(without_pictures: None) -> None:
    """Tests that look at charts override this."""


def write_sums(path: Path) -> Path:
    """Write sixty question/answer rows, each with words of its own."""
    lines = [
        json.dumps({"question": f"What is {number} plus {number}?", "answer": f"It is {2 * number}."})
        for number in range(60)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def short_training(model: Path, place: Path) -> list[str]:
    """Return the flags of a short training with its run below ``place``."""
    return [
        "--model", str(model), "--max-steps", "4", "--set", f"run.root={place / 'runs'}",
        "--set", "training.batch_size=8", "--set", "data.heldout_fraction=0.2", "--set", "training.learning_rate=1e-2",
    ]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_sums(tmp_path / "rows.jsonl")


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path) -> list[str]:
    return short_training(tiny_model, tmp_path)


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the program in an empty folder with a cache of its own; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))

    return program(monkeypatch, capsys)


def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return what runs the program where the test is; each command that it names next is parsed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sft", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        told = [line for line in err.splitlines() if line.startswith(("next: ", "help: ", "resume with: "))]
        assert [fault for line in told for fault in faults_in(line)] == []
        return end.value.code or 0, out, err

    return run
