"""A .pt checkpoint goes in, is trained, stopped, resumed, asked, scored, and comes out as a .pt again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.modeling.pt_checkpoint import read_pt
from tests.support.tiny_modern import build_tiny_pt
from tests.support.tiny_tokenizer import build_tiny_tokenizer

GSM8K = Path(__file__).parents[3] / "shared/data/prompt_completion/gsm8k_train.jsonl"


def sft(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return build_tiny_tokenizer(
        tmp_path / "tokenizer", template=None, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    if not GSM8K.is_file():
        pytest.skip("the shared data are not here")
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(
        "".join(GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:160]), encoding="utf-8"
    )
    return path


def test_a_pt_is_trained_resumed_exactly_asked_scored_and_written_back(tokenizer, gsm8k, tmp_path):
    pt = build_tiny_pt(tmp_path / "pretrain_final.pt")
    flags = [
        "--data", gsm8k, "--model", pt, "--tokenizer", tokenizer, "--max-steps", "20", "--set",
        f"run.root={tmp_path / 'runs'}", "--set", "training.batch_size=4", "--set", "training.learning_rate=1e-3",
        "--set", "data.heldout_max_rows=6", "--set", "checkpoint.every_steps=10",
    ]  # fmt: skip
    sft("train", "--run", "whole", *flags)
    whole = tmp_path / "runs" / "whole"
    assert sorted(path.name for path in whole.glob("*.pt")) == [
        "whole-sft_final.pt", "whole-sft_step10.pt", "whole-sft_step20.pt",
    ]  # fmt: skip
    original, final = read_pt(pt), read_pt(whole / "whole-sft_final.pt")
    shapes = [{name: tensor.shape for name, tensor in part.model_state.items()} for part in (original, final)]
    assert shapes[0] == shapes[1]
    assert final.config == original.config
    assert (final.step, final.run_name) == (20, "whole-sft")
    tuned = load_file(whole / "checkpoints" / "step-00000020" / "model.safetensors")
    assert all(
        torch.equal(tensor, final.model_state[name.removeprefix("model.")]) for name, tensor in tuned.items()
    )

    before = {name: tensor.clone() for name, tensor in final.model_state.items()}
    shutil.rmtree(whole / "final")
    (whole / "whole-sft_final.pt").unlink()
    sft("resume", "whole", "--checkpoint", "10", "--runs", tmp_path / "runs")
    again = read_pt(whole / "whole-sft_final.pt").model_state
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())

    final_pt = whole / "whole-sft_final.pt"
    asked = json.loads(sft("generate", "What is 2 plus 2?", "--checkpoint", final_pt, "--tokenizer", tokenizer,
                           "--max-new-tokens", "5", "--json"))  # fmt: skip
    assert asked["new_tokens"] >= 0
    scored = json.loads(
        sft("eval", final_pt, "--tokenizer", tokenizer, "--data", gsm8k, "--max-rows", "2", "--json")
    )
    assert scored["tuned"]["loss"] > 0
    log = (whole / "training.log").read_text(encoding="utf-8")
    for line in (
        "Model: 0.0M parameters",
        "Loading instruction dataset: ",
        "Training examples: ",
        "step=20 loss=",
    ):
        assert line in log
