import pytest


@pytest.fixture(autouse=True)
def _no_pictures(without_pictures: None) -> None:
    """Tests that look at charts override this."""
