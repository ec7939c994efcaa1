"""Every preset loads, is complete, and has the numbers of the recipe it stands for."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sftcli.config.presets import REFERENCE_PREFIX, preset_file, preset_folder, preset_names, read_preset
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import Settings

REPO = Path(__file__).parents[2]


def settings(name: str) -> Settings:
    return resolve(preset=name, config_file=None, overrides=[], environ={}).settings


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_described_and_names_data(name):
    assert read_preset(name).description
    assert settings(name).data.sources


@pytest.mark.parametrize("name", preset_names())
def test_files_that_a_preset_names_come_with_it(name):
    data = settings(name).data
    for source in (*data.sources, *data.heldout_sources):
        if source.startswith(REFERENCE_PREFIX):
            assert preset_file(source).stat().st_size > 0


@pytest.mark.parametrize("name", ["local-smoke", "local", "gpu-smoke", "gpu"])
def test_recipe_is_that_of_the_source_document(name):
    training = settings(name).training
    assert training.batch_size == 32
    assert training.learning_rate == 1e-5
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.95, 0.01)
    assert training.schedule == "cosine"
    assert settings(name).checkpoint.every_steps == 2000


@pytest.mark.parametrize(
    ("name", "steps", "micro_batch"),
    [("local-smoke", 50, 2), ("local", 5000, None), ("gpu-smoke", 50, None), ("gpu", 10000, None)],
)
def test_budget_is_that_of_the_source_document(name, steps, micro_batch):
    training = settings(name).training
    assert training.max_steps == steps
    assert micro_batch in (None, training.micro_batch_size)
    assert training.num_warmup_steps <= max(100, 0.03 * steps)


def test_data_sets_are_those_of_the_source_document():
    assert settings("local").data.sources == ("tatsu-lab/alpaca",)
    assert settings("local-smoke").data.sources == ("tatsu-lab/alpaca",)
    mix = ["tatsu-lab/alpaca", "databricks/databricks-dolly-15k", "Open-Orca/OpenOrca"]
    for name in ("gpu", "gpu-smoke"):
        assert [source.split(":")[0] for source in settings(name).data.sources] == mix
    assert settings("gpu").data.sources[2].endswith(":50000")
    assert settings("gpu").data.max_tokens == 1024


def test_the_wheel_carries_the_presets_to_where_they_are_looked_for_first():
    build = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"] == {"presets": "sftcli/_presets"}
    assert preset_folder() in (REPO / "presets", REPO / "sftcli" / "_presets")


def test_settings_need_none_of_the_heavy_packages():
    code = (
        "import sys, sftcli.config.resolve\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"
