"""A package that is asked for and not installed is missed at once: before torch is loaded, a model found or a run made."""

import sys
from pathlib import Path

import pytest
import torch

from sftcli import extras

NOWHERE = ["--model", "nowhere/at-all"]  # finding it would fail in another way
CASES = {
    "bitsandbytes>=0.50": ["train", *NOWHERE, "--set", "training.optimizer=adamw_8bit"],
    "wandb>=0.19": ["train", *NOWHERE, "--track", "wandb"],
    "mlflow-skinny>=2.20": ["train", *NOWHERE, "--track", "mlflow", "--plan"],
    "tensorboard>=2.18": ["train", *NOWHERE, "--track", "tensorboard", "--processes", "2"],
    "lm-eval>=0.4.9": ["eval", "nowhere/at-all", "--tasks", "arc_easy"],
    "rouge-score>=0.1.2": ["eval", "nowhere/at-all", "--fail-under", "rouge_l=20"],
    "sacrebleu>=2.5": ["eval", "nowhere/at-all", "--fail-above", "chrf=20"],
}


@pytest.mark.parametrize(("requirement", "arguments"), CASES.items(), ids=CASES)
def test_missing_package_is_told_before_anything_slow(
    sft, tmp_path: Path, monkeypatch, requirement: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, out, err = sft(*arguments)
    assert (code, out) == (2, "")
    assert "not installed" in err
    assert f'pip install "{requirement}"' in err
    assert "loading" not in err
    assert not (tmp_path / "runs").exists()


def test_run_goes_on_where_a_tracker_of_its_start_is_missing(sft, rows, flags, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    tracked = ["--set", "checkpoint.every_steps=2", "--track", "tensorboard"]
    assert sft("train", "--data", rows, "--run", "one", *flags, *tracked)[0] == 0
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = sft("resume", "one", "--checkpoint", "2")
    assert code == 0, err
    assert "the run continues without it" in err


def test_four_bits_and_paged_optimizer_name_the_device_before_the_package(sft, monkeypatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for asked in (["--adapter", "qlora"], ["--set", "training.optimizer=paged_adamw_8bit"]):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        code, _, err = sft("train", *NOWHERE, *asked)
        assert code != 0
        assert "CUDA device" in err
        assert "bitsandbytes" not in err
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        code, _, err = sft("train", *NOWHERE, *asked)
        assert code == 2
        assert 'pip install "bitsandbytes>=0.' in err
