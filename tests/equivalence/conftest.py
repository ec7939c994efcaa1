import pytest


@pytest.fixture(autouse=True)
def _no_pictures(without_pictures: None) -> None:
    """Nothing here looks at a report."""
