"""The precision of a new training: by what the processor is, else by timings that agree, once for a machine."""

import random

import pytest
import torch

from sftcli.cache import cache_folder
from sftcli.services.machine import precision
from sftcli.services.machine.precision import (
    MEASUREMENTS,
    REMEMBERED,
    Precision,
    compare_products,
    decide_precision,
)

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Return what sets the times of products of a machine that has bfloat16 instructions and no matrix units."""
    monkeypatch.setattr(precision, "has_bf16_products", lambda device: True)
    monkeypatch.setattr(precision, "has_matrix_units", lambda: False)
    monkeypatch.setattr(precision, "choose_dtype", lambda setting, device: DTYPES[setting])

    def takes(**seconds):
        precision.measured_here.cache_clear()
        times = {getattr(torch, name): value for name, value in seconds.items()}
        monkeypatch.setattr(precision, "products_seconds", lambda dtype: lambda: times[dtype])

    yield takes
    precision.measured_here.cache_clear()


DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize(
    ("bfloat16", "chosen"), [(2.0, "fp32"), (1.05, "bf16"), (1.0, "bf16"), (0.2, "bf16")]
)
def test_auto_trains_in_the_precision_that_multiplies_faster_and_says_why(machine, bfloat16, chosen):
    machine(bfloat16=bfloat16, float32=1.0)
    decided = decide_precision("auto", CPU)
    assert decided.name == chosen
    assert "measured" in decided.why


def test_a_precision_that_was_asked_for_is_not_measured_away(machine):
    machine(bfloat16=2.0, float32=1.0)
    assert decide_precision("bf16", CPU) == Precision(name="bf16", why="set by training.precision")
    machine(bfloat16=0.1, float32=1.0)
    assert decide_precision("fp32", CPU).name == "fp32"


def test_a_processor_with_matrix_units_is_not_measured(machine, monkeypatch):
    machine(bfloat16=9.0, float32=1.0)
    monkeypatch.setattr(precision, "has_matrix_units", lambda: True)
    assert decide_precision("auto", CPU).name == "bf16"


def test_the_next_start_takes_what_was_measured_before_and_another_machine_measures_anew(
    machine, monkeypatch
):
    machine(bfloat16=2.0, float32=1.0)
    first = decide_precision("auto", CPU)
    machine(bfloat16=0.5, float32=1.0)
    assert decide_precision("auto", CPU) == first
    monkeypatch.setattr(precision, "processor", lambda: "another")
    assert decide_precision("auto", CPU).name == "bf16"
    assert len(MEASUREMENTS.read(cache_folder() / REMEMBERED)) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 1}', '{"a": {"precision": "fp8", "why": ""}}', "\udcff"]
)
def test_what_is_remembered_and_damaged_is_measured_again(machine, content):
    (cache_folder() / REMEMBERED).write_bytes(content.encode("utf-8", "surrogateescape"))
    machine(bfloat16=2.0, float32=1.0)
    assert decide_precision("auto", CPU).name == "fp32"


def test_a_machine_without_a_cache_measures(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    machine(bfloat16=2.0, float32=1.0)
    assert decide_precision("auto", CPU).name == "fp32"


def noisy(seconds: float, noise: random.Random):
    """A product that other programs make up to four times as slow, now and then."""
    return lambda: seconds * (noise.uniform(1, 4) if noise.random() < 0.4 else noise.uniform(0.97, 1.03))


@pytest.mark.parametrize(("bfloat16", "chosen"), [(5.0, "fp32"), (2.0, "fp32"), (0.5, "bf16"), (0.2, "bf16")])
def test_a_busy_machine_decides_as_an_idle_one(bfloat16, chosen):
    for seed in range(300):
        noise = random.Random(seed)
        assert compare_products(noisy(bfloat16, noise), noisy(1.0, noise)).name == chosen, seed
