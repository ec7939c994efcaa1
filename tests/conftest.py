import os
import signal

os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb", HF_HUB_OFFLINE="1")

import pytest
import torch
from hypothesis import settings

from tests.support.long_tests import long_tests

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")
# A shell that runs tests in the background has interrupts ignored, nohup has hangups, and so has every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say which part of the tests runs; without one all of what is named does, else the short ones."""
    parser.addoption("--short", action="store_true", help="leave out those of tests/long.txt")
    parser.addoption("--long", action="store_true", help="run those of tests/long.txt alone")


def pytest_configure(config: pytest.Config) -> None:
    """Leave long tests out where no file or folder is named; processes of xdist are told of it as of an option."""
    if config.args_source is config.ArgsSource.TESTPATHS and not config.option.long:
        config.option.short = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the part that is asked for, and let slow tests take their time: only the others have a limit."""
    short, long = config.option.short, config.option.long
    if short or long:
        names = long_tests()
        chosen = [item for item in items if (item.nodeid.partition("[")[0] in names) is long]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
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
