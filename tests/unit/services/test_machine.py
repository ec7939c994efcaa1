from pathlib import Path

import pytest

from sftcli.errors import UsageError
from tests.support.runs import StopAtStep, settings_of, train


def test_weights_that_cannot_be_spread_yet_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = settings_of(Path(), Path("model"), "run.name=exp", "training.parallel=fsdp")
    with pytest.raises(UsageError, match=r"training\.parallel is fsdp") as caught:
        train(settings, StopAtStep(9))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
