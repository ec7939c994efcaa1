"""Training on from the model of a run whose files are damaged: what is not known is not passed over, and there is a way on."""

import shutil
from pathlib import Path

import pytest

from sftcli.config.resolve import parse_set, resolve
from sftcli.errors import DataError
from sftcli.services.runs.lineage import lineage_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/first")
    (run / "final").mkdir(parents=True)
    (run / "final" / "config.json").write_text("{}", encoding="utf-8")
    (run / "run.json").write_text("{}", encoding="utf-8")
    return run


def lineage(model: Path) -> tuple:
    changes = (parse_set(f"model.name={model}"),)
    return lineage_of(resolve(preset=None, config_file=None, overrides=changes, environ={}).settings)


@pytest.mark.parametrize("name", ["run.json", "data.json"])
def test_what_earlier_runs_held_out_is_not_passed_over_and_a_copy_is_the_way_on(run, name):
    assert [one.run for one in lineage(run / "final")] == ["first"]
    (run / name).write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=name) as caught:
        lineage(run / "final")
    assert f"copy the model's folder out of {run.absolute()} and name the copy" in caught.value.hint
    assert lineage(Path(shutil.copytree(run / "final", "copy"))) == ()
