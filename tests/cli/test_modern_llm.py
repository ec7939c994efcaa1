"""A .pt checkpoint goes in, is trained, stopped, resumed, asked, scored, and comes out as a .pt again."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.cli.errors.show import guarded
from sftcli.modeling.formats.pt_file import read_pt
from tests.support.runs import write_rows
from tests.support.tiny_modern import build_tiny_pt, tiny_modern
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
    assert f"SFT complete. Final checkpoint: {final_pt}\n" in log
    for line in (
        "Model: 0.0M parameters",
        "Loading instruction dataset: ",
        "Training examples: ",
        "step=20 loss=",
    ):
        assert line in log


def short_run(tmp_path: Path, tokenizer: Path, pt: Path, *more: object):
    rows = write_rows(tmp_path / "rows.jsonl")
    return CliRunner().invoke(
        app,
        [
            str(part)
            for part in (
                "train", "--data", rows, "--model", pt, "--tokenizer", tokenizer, "--run", "first", "--max-steps", "4",
                "--set", f"run.root={tmp_path / 'runs'}", "--set", "training.batch_size=4", *more,
            )
        ],
    )  # fmt: skip


def test_step_files_go_with_their_checkpoints(tokenizer, tmp_path):
    keep = (
        "--set",
        "checkpoint.every_steps=1",
        "--set",
        "checkpoint.keep_last=2",
        "--set",
        "checkpoint.keep_best=false",
    )
    assert short_run(tmp_path, tokenizer, build_tiny_pt(tmp_path / "a.pt"), *keep).exit_code == 0
    run = tmp_path / "runs" / "first"
    assert sorted(path.name for path in run.glob("*.pt")) == [
        "first-sft_final.pt", "first-sft_step3.pt", "first-sft_step4.pt",
    ]  # fmt: skip


def test_written_optimizer_state_goes_on_in_a_torch_adamw(tokenizer, tmp_path):
    assert short_run(tmp_path, tokenizer, build_tiny_pt(tmp_path / "a.pt")).exit_code == 0
    content = torch.load(tmp_path / "runs" / "first" / "first-sft_final.pt", weights_only=True)
    model = tiny_modern(seed=5)
    state = {
        f"model.{name}" if name != "lm_head.weight" else name: t for name, t in content["model_state"].items()
    }
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(content["optimizer_state"])
    trained = [moments for moments in optimizer.state.values() if "exp_avg" in moments]
    assert {float(moments["step"]) for moments in trained} == {4.0}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(input_ids=torch.tensor([[5, 9, 33]]), labels=torch.tensor([[5, 9, 33]])).loss.backward()
    optimizer.step()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_keys_of_the_model_that_differ_from_the_checkpoint_are_told(tokenizer, tmp_path):
    config = tmp_path / "pipeline.json"
    config.write_text(json.dumps({"n_layers": 7, "n_heads": 4, "sft_lr": 1e-3}), encoding="utf-8")
    result = short_run(tmp_path, tokenizer, build_tiny_pt(tmp_path / "a.pt"), "--config", config)
    assert result.exit_code == 0
    assert "n_layers is 7, the checkpoint that it is 2, which is used" in result.stderr
    assert "n_heads" not in result.stderr


class _Canary:
    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


def _bad_files(folder: Path) -> dict[str, tuple[Path, int, str]]:
    """Return name -> (file, exit code, what the message says)."""
    good = build_tiny_pt(folder / "good.pt")
    content = torch.load(good, weights_only=True)
    torch.save(content | {"run_name": _Canary(folder / "canary")}, folder / "malicious.pt")
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:2000])
    wrong = dict(content["model_state"]) | {"final_norm.weight": torch.ones(3)}
    torch.save(content | {"model_state": wrong}, folder / "misfit.pt")
    torch.save(content | {"config": content["config"] | {"use_moe": True}}, folder / "moe.pt")
    return {
        "malicious": (folder / "malicious.pt", 65, "could run code"),
        "truncated": (folder / "truncated.pt", 65, "damaged or cut off"),
        "misfit": (folder / "misfit.pt", 78, "final_norm.weight is (3,), its config says (32,)"),
        "moe": (folder / "moe.pt", 78, "use_moe"),
    }


@pytest.mark.parametrize("kind", ["malicious", "truncated", "misfit", "moe"])
@pytest.mark.parametrize("command", ["train", "generate", "eval", "export"])
def test_bad_files_end_every_command_with_one_message_and_nothing_is_run(command, kind, tmp_path, capsys):
    path, code, words = _bad_files(tmp_path)[kind]
    rows = write_rows(tmp_path / "rows.jsonl")
    arguments = {
        # No tokenizer of this name is here, and none is looked for: what is wrong with the file comes first.
        "train": [
            "train",
            "--model",
            path,
            "--tokenizer",
            "no/such",
            "--data",
            rows,
            "--set",
            f"run.root={tmp_path / 'r'}",
        ],
        "generate": ["generate", "hello", "--checkpoint", path, "--tokenizer", "no/such"],
        "eval": ["eval", path, "--tokenizer", "no/such", "--data", rows, "--no-base"],
        "export": ["export", path, "--tokenizer", "no/such", "--to", "hf", "--out", tmp_path / "out"],
    }[command]
    run = functools.partial(app, [str(part) for part in arguments], standalone_mode=False)
    assert guarded(run, command=f"sft {command}") == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("error: ") == 1
    assert words in shown.err
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()
