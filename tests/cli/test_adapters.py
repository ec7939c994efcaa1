"""Adapter runs as a person makes them: train, go on, ask, score, export; and folders that would run code."""

import json
import pickle
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.errors import ConsentError, NetworkError, NotFoundError, ResourceError, UsageError
from sftcli.modeling.adapter.adapter import merge_adapter
from sftcli.modeling.adapter.folder import CONFIG_FILE
from sftcli.modeling.locate.default_model import HUB_NAME
from sftcli.services.export.export import DTYPES
from tests.support.foreign_adapter import IDS, foreign_adapter, logits_by_peft
from tests.support.runs import events_of


def sft(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def run(rows: Path, flags: list[str], tmp_path: Path) -> Path:
    sft("train", "--data", rows, "--run", "lora", "--lora", "--rank", "4", *flags)
    return tmp_path / "runs" / "lora"


def test_adapter_run_is_small_scored_beside_its_base_and_merged_by_export(run, tiny_model, tmp_path):
    final, runs = run / "final", tmp_path / "runs"
    assert not list(run.rglob("model.safetensors"))
    assert all(".lora_" in name for name in load_file(final / "adapter_model.safetensors"))
    report = json.loads(sft("eval", "lora", "--runs", runs, "--json"))
    last = events_of(run, "HeldoutDone")[-1]["loss"]
    assert report["tuned"]["loss"] == pytest.approx(last, rel=2e-2)
    assert report["base"]["loss"] > report["tuned"]["loss"]
    sft("export", "lora", "--runs", runs, "--to", "hf", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits_by_peft(tiny_model, final), atol=1e-5, rtol=0)
    again = json.loads(sft("eval", tmp_path / "merged", "--runs", runs, "--no-base", "--json",
                           "--data", _heldout_rows(tmp_path)))  # fmt: skip
    mine = json.loads(
        sft("eval", final, "--runs", runs, "--no-base", "--json", "--data", _heldout_rows(tmp_path))
    )
    assert again["tuned"]["loss"] == pytest.approx(mine["tuned"]["loss"], abs=1e-6)
    assert "LoRA of rank 4" in (run / "report.html").read_text(encoding="utf-8")


def _heldout_rows(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(70, 80)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_folder_made_elsewhere_answers_beside_its_base_with_the_tokenizer_of_the_base(tiny_model, tmp_path):
    folder = foreign_adapter(tiny_model, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    assert not (folder / "tokenizer.json").exists()
    out = sft("generate", "Hello?", "--checkpoint", folder, "--base", "--max-new-tokens", "3", "--json")
    assert json.loads(out)["ok"]


def test_base_that_was_named_by_a_relative_path_is_found_from_elsewhere(
    tiny_model, rows, flags, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_model.parent)
    place = flags.index(str(tiny_model))
    flags = [*flags[:place], f"./{tiny_model.name}", *flags[place + 1 :]]
    sft("train", "--data", rows, "--run", "lora", "--lora", "--rank", "2", "--max-steps", "1", *flags)
    final = tmp_path / "runs" / "lora" / "final"
    monkeypatch.chdir(tmp_path)
    assert json.loads((final / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(tiny_model)
    sft("generate", "Hello?", "--checkpoint", final, "--max-new-tokens", "1")
    assert len(logits_by_peft(tiny_model, final)) == 1


def test_base_that_has_moved_can_be_named(bf16_adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    rows = _heldout_rows(tmp_path)
    with pytest.raises(NotFoundError) as found:
        sft("eval", bf16_adapter, "--data", rows)
    assert "--base-model MODEL" in found.value.hint
    named = ("--base-model", tmp_path / "moved")
    sft("generate", "Hello?", "--checkpoint", bf16_adapter, "--max-new-tokens", "1", "--base", *named)
    sft("export", bf16_adapter, "--to", "hf", "--out", tmp_path / "merged", *named)
    report = json.loads(sft("eval", bf16_adapter, "--json", "--data", rows, "--max-rows", 1, *named))
    assert report["base"]["model"] == str(tmp_path / "moved")
    with pytest.raises(UsageError, match="is not an adapter"):
        sft("generate", "Hello?", "--checkpoint", tmp_path / "moved", *named)


def test_base_on_a_hub_that_cannot_be_asked_is_told_with_the_way_out(bf16_adapter, monkeypatch):
    def refuse(*_arguments: object, **_options: object) -> None:
        raise NetworkError("the hub cannot be reached")

    monkeypatch.setattr("sftcli.modeling.locate.locate.fetch_snapshot", refuse)
    path = bf16_adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": HUB_NAME}))
    with pytest.raises(NetworkError, match="has the base model HuggingFaceTB/SmolLM2-135M-Instruct") as found:
        sft("generate", "Hello?", "--checkpoint", bf16_adapter)
    assert "--base-model smollm2-135m" in found.value.hint


@pytest.fixture
def bf16_adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter that changes about as much as a step of its base's bfloat16."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    folder = foreign_adapter(
        base, tmp_path / "adapter", r=4, lora_alpha=0.1, target_modules=["q_proj", "up_proj"]
    )
    exact = merge_adapter(folder, base=base).state_dict()
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    return folder


def test_scores_are_those_of_what_an_export_holds(bf16_adapter, tmp_path):
    rows = _heldout_rows(tmp_path)
    sft("export", bf16_adapter, "--to", "hf", "--out", tmp_path / "merged")
    scores = [
        json.loads(sft("eval", model, "--no-base", "--json", "--data", rows, "--max-rows", 2))["tuned"]
        for model in (bf16_adapter, tmp_path / "merged")
    ]
    for score in scores:
        score.pop("seconds")
        score.pop("model", None)
    assert scores[0] == scores[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_merged_weights_are_rounded_once_to_what_was_asked_for(bf16_adapter, tmp_path):
    exact = merge_adapter(bf16_adapter, base=tmp_path / "base").state_dict()
    for dtype in ("f32", "bf16", "f16"):
        sft("export", bf16_adapter, "--to", "hf", "--dtype", dtype, "--out", tmp_path / dtype)
        for name, tensor in load_file(tmp_path / dtype / "model.safetensors").items():
            assert torch.equal(tensor, exact[name].to(DTYPES[dtype])), name
    sft("export", bf16_adapter, "--to", "gguf", "--dtype", "f16", "--out", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    up = torch.from_numpy(tensors["blk.1.ffn_up.weight"].copy())
    assert torch.equal(up, exact["model.layers.1.mlp.up_proj.weight"].half())


def test_hostile_adapter_config_and_pickle_weights_run_nothing(tiny_model, tmp_path):
    trace = tmp_path / "the payload was run"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    folder = foreign_adapter(tiny_model, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    path.write_text(json.dumps(config))
    sft("generate", "Hello?", "--checkpoint", folder, "--max-new-tokens", "1")
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(Exception, match="holds no model"):
        sft("generate", "Hello?", "--checkpoint", folder)
    path.write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(ConsentError, match=r"adapter_model\.bin is a pickle file"):
        sft("generate", "Hello?", "--checkpoint", folder)
    assert not trace.exists()


def test_four_bits_without_cuda_and_a_rank_without_an_adapter_are_refused_before_anything(
    rows, flags, tmp_path
):
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="needs a CUDA device"):
            sft("train", "--data", rows, "--adapter", "qlora", *flags)
    with pytest.raises(UsageError, match="rank is set, but kind is none"):
        sft("train", "--data", rows, "--rank", "8", *flags)
    assert not (tmp_path / "runs").exists()
