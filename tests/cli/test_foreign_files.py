"""Files of others that load and compute nothing, or lie beside a model: each command says so, or lets them be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt

TRAIN = ("--max-steps", "1", "--set", "training.batch_size=8", "--set", "training.precision=fp32")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def multiply(model: Path, factor: float, name: str = "") -> None:
    tensors = load_file(model / "model.safetensors")
    for found, tensor in tensors.items():
        if name in ("", found):
            tensor *= factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def commands(model: object, rows: Path) -> dict[str, tuple[object, ...]]:
    return {
        "train": ("train", "--data", rows, "--model", model, *TRAIN),
        "generate": ("generate", "Hi", "--checkpoint", model, "--max-new-tokens", "2", "--precision", "fp32"),
        "eval": ("eval", model, "--data", rows, "--no-base", "--max-rows", "2"),
        "export": ("export", model, "--to", "gguf", "--out", "out.gguf"),
    }


def test_a_number_that_is_none_is_refused_by_each_command(sft, rows, model):
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": float("nan")}))
    for command in commands(model, rows).values():
        code, _, err = sft(*command)
        assert code == 65
        assert "rms_norm_eps is nan, expected a finite number" in err


def test_weights_that_are_not_finite_are_refused_by_each_command(sft, rows, model):
    multiply(model, torch.nan)
    for command in commands(model, rows).values():
        code, _, err = sft(*command)
        assert code == 65
        assert "hold non-finite values" in err


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_model_whose_numbers_overflow_gives_no_answer(sft, rows, model, command):
    multiply(model, 3e38, "model.norm.weight")
    code, _, err = sft(*commands(model, rows)[command])
    assert code == 65
    assert "computes non-finite numbers in float32" in err


@pytest.mark.parametrize("kind", ["gguf", "pt"])
def test_a_file_of_weights_that_are_not_finite_is_refused(sft, model, kind):
    if kind == "gguf":
        multiply(model, torch.nan)
        file, more = build_tiny_gguf(model, Path("m.gguf").absolute()), ()
    else:
        file, more = build_tiny_pt(Path("m.pt").absolute()), ("--tokenizer", model)
        content = torch.load(file, weights_only=True)
        content["model_state"]["final_norm.weight"] *= torch.nan
        torch.save(content, file)
    code, _, err = sft("generate", "Hi", "--checkpoint", file, "--max-new-tokens", "2", *more)
    assert code == 65
    assert "non-finite" in err


def test_a_stray_file_beside_a_model_is_let_be(sft, rows, model):
    (model / "evil.safetensors").write_bytes(b"\0")
    assert sft(*commands(model, rows)["train"])[0] == 0


def test_a_model_with_fewer_rows_than_its_tokenizer_has_tokens_is_refused(sft, rows, tmp_path):
    model = build_tiny_model(tmp_path / "small")
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 200}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    every = commands(model, rows)
    for command, told in (
        ("train", "rows hold tokens that the model has no embedding for"),
        ("generate", "holds token"),
    ):
        code, _, err = sft(*every[command])
        assert code == 78
        assert told in err


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_file_that_was_not_fetched_is_told_with_the_command_that_does(sft, rows, model, name):
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    code, _, err = sft(*commands(model, rows)["generate"])
    assert code == 65
    assert f"{model / name} is a pointer of Git LFS" in err
    assert "git lfs pull" in err


def test_half_of_a_surrogate_pair_as_a_key_is_told_with_its_row(sft, tiny_model):
    Path("odd.jsonl").write_text('{"prompt": "a", "completion": "b", "meta": {"\\udfff": 1}}\n')
    code, _, err = sft("prepare", "odd.jsonl", "--model", tiny_model)
    assert code == 65
    assert "odd.jsonl:1" in err
