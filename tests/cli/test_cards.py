"""The card of what is written: where it is from, under which license, and lines that open it as they stand."""

import json
from pathlib import Path

import pytest
import yaml

from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME
from sftcli.services.models.choose import ModelChoice
from sftcli.services.report.model_card import base_of, license_of, model_card
from sftcli.services.report.usage import usage_of_adapter, usage_of_gguf, usage_of_model
from sftcli.services.runs.folder import RunFolder
from tests.cli.conftest import short_training
from tests.support.tiny_model import build_tiny_model


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def head_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def licensed(tmp_path) -> Path:
    folder = build_tiny_model(tmp_path / "walnut")
    (folder / "README.md").write_text(
        "---\r\nlicense: other\r\nlicense_name: nut\r\nlicense_link: https://example.org/nut\r\n---\r\nwords\r\n"
    )
    return folder


@pytest.mark.parametrize("adapter", [[], ["--lora"]], ids=["whole", "adapter"])
def test_an_export_names_the_license_of_its_base_and_opens_as_its_card_says(
    sft, licensed, rows, tmp_path, adapter, capsys
):
    assert (
        sft(
            "train", "--data", rows, *short_training(licensed, tmp_path), "--run", "one", *adapter, "--quiet"
        )[0]
        == 0
    )
    assert sft("export", "one", "--to", "hf", "--out", "mine", "--quiet")[0] == 0
    card = Path("mine/README.md").read_text(encoding="utf-8")
    head = head_of(card)
    assert (head["license"], head["license_name"]) == ("other", "nut")
    assert head["license_link"] == "https://example.org/nut"
    assert "base_model" not in head  # a folder of this machine is nothing to others
    assert head["pipeline_tag"] == "text-generation"
    assert "vllm serve mine\n" in card
    exec(code_of(card), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_lines_for_an_adapter_open_it(sft, licensed, rows, tmp_path, capsys):
    sft("train", "--data", rows, *short_training(licensed, tmp_path), "--run", "one", "--lora", "--quiet")
    usage = usage_of_adapter(Path("runs/one/final"), "runs/one/final", base="")
    assert "vllm" not in usage.text
    exec(code_of(usage.text), {})
    assert capsys.readouterr().out.strip()


def adapter_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    written = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "owner/base"} | config
    (path / "adapter_config.json").write_text(json.dumps(written))
    return path


def test_vllm_is_named_only_for_adapters_that_it_adds(tmp_path):
    line = "vllm serve owner/base --enable-lora --lora-modules tuned=me/mine\n"
    assert line in usage_of_adapter(adapter_folder(tmp_path / "a"), "me/mine", "owner/base").text
    large = usage_of_adapter(adapter_folder(tmp_path / "b", r=32), "me/mine", "owner/base").text
    assert "--enable-lora --max-lora-rank 32 --lora-modules" in large
    between = usage_of_adapter(adapter_folder(tmp_path / "d", r=24), "me/mine", "owner/base").text
    assert "--max-lora-rank 32 " in between  # it takes some numbers only
    assert "vllm" not in usage_of_adapter(adapter_folder(tmp_path / "e", r=600), "me/mine", "owner/base").text
    for number, key in enumerate(("use_dora", "modules_to_save", "target_parameters")):
        folder = adapter_folder(tmp_path / f"c{number}", **{key: ["x"]})
        assert "vllm" not in usage_of_adapter(folder, "me/mine", "owner/base").text


def test_vllm_is_not_named_for_a_class_of_ours():
    assert "vllm serve" in usage_of_model("LlamaForCausalLM", "m").text
    assert "vllm serve" not in usage_of_model("ModernLMForCausalLM", "m").text
    assert "AutoModelForImageTextToText" in usage_of_model("Gemma3ForConditionalGeneration", "m").text


def test_a_gguf_is_opened_from_its_folder_or_from_the_hub():
    here = usage_of_gguf("mine.gguf", "Mine", is_on_hub=False).text
    assert "ollama create mine -f Modelfile\nollama run mine\n" in here
    assert "llama-cli -m mine.gguf -cnv\n" in here
    hub = usage_of_gguf("mine.gguf", "me/Mine", is_on_hub=True).text
    assert "ollama run hf.co/me/Mine\n" in hub
    assert "llama-cli -hf me/Mine -cnv\n" in hub


def run_of(folder: Path, model: str) -> RunFolder:
    folder.mkdir()
    (folder / "config.toml").write_text(f'[model]\nname = "{model}"\n')
    (folder / "run.json").write_text("{}")
    return RunFolder(folder)


def test_the_default_model_is_named_as_the_hub_knows_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    choice = ModelChoice(name="one", folder=tmp_path, run=run_of(tmp_path / "one", ALIAS))
    assert base_of(choice) == HUB_NAME
    assert license_of(choice) == "apache-2.0"
    card = model_card("mine", choice, usage_of_model("LlamaForCausalLM", "mine"))
    assert head_of(card)["base_model"] == HUB_NAME
    assert f"{HUB_NAME}, fine-tuned" in card


def test_the_license_of_a_hub_model_is_that_of_its_copy_here(tmp_path, monkeypatch):
    commit = "1234567890abcdef1234567890abcdef12345678"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = tmp_path / "hf" / "hub" / "models--owner--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    run = run_of(tmp_path / "one", "owner/base")
    run.about.write_text(json.dumps({"base": {"name": "owner/base", "revision": commit}}))
    assert license_of(ModelChoice(name="one", folder=tmp_path, run=run)) == "mit"
    adapter = adapter_folder(tmp_path / "a", revision=commit)
    choice = ModelChoice(name="a", folder=adapter, run=None)
    assert (base_of(choice), license_of(choice)) == ("owner/base", "mit")


def test_a_card_without_a_license_has_no_line_for_it(tmp_path):
    choice = ModelChoice(name="x", folder=tmp_path, run=None)
    assert "license" not in model_card("x", choice, usage_of_model("LlamaForCausalLM", "x"))
