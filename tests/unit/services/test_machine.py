from pathlib import Path

import pytest

from sftcli.errors import UsageError
from tests.support.runs import StopAtStep, settings_of, train


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_started_processes_is_refused_before_it_writes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match=f"2 processes were started \\({name}=2\\)") as caught:
        train(settings_of(Path(), Path("model"), "run.name=exp"), StopAtStep(9))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
