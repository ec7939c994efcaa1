import os
import signal

os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb", HF_HUB_OFFLINE="1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")
# A shell that runs tests in the background has interrupts ignored, nohup has hangups, and so has every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the slow ones take their time: only the others have the limit of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of reports, half the time of a tiny run: they have tests of their own."""
    monkeypatch.setattr("sftcli.services.report.curves.draw", lambda *_args, **_kwargs: "<svg></svg>")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's cache, and without the user's settings."""
    for name in [name for name in os.environ if name.startswith("SFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
