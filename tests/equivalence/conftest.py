import pytest


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of reports, half the time of a tiny run: nothing here looks at them, and they have their own tests."""
    monkeypatch.setattr("sftcli.services.report.html.draw", lambda *_args, **_kwargs: "<svg></svg>")
