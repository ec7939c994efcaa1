from pathlib import Path

import pytest

from tests.support.bench import Bench


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("crash")


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ``Bench`` whose disk is set up."""
    root = tmp_path_factory.mktemp("machine").resolve()
    Bench(root).set_up()
    return root
