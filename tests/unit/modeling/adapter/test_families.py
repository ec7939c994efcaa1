"""Adapters in families that have more than linear layers: what auto takes, and experts, against plain peft."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.errors import MismatchError, UsageError
from sftcli.modeling.adapter.adapter import add_adapter, load_adapter, merge_adapter, set_adapter
from sftcli.modeling.adapter.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterBase,
    read_shape,
    write_adapter_config,
)
from sftcli.modeling.adapter.targets import file_name
from sftcli.modeling.load import load_model
from tests.support.tiny_family import apart, build_tiny_family, logits_of

LIMIT = 1e-4
# Lists of layers, routers that are linear layers, weights that kernels read, layers that peft takes for experts, shared ones.
AUTO = ("gemma3n_text", "phimoe", "mamba", "deepseek_v3", "zamba2", "falcon")
MORE_AUTO = (
    "llama4_text", "hunyuan_v1_moe", "granitemoe", "jamba", "falcon_h1", "nemotron_h", "deepseek_v4", "qwen3_next", "bloom",
)  # fmt: skip
WITH_EXPERTS = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text")
MORE_WITH_EXPERTS = (
    "qwen2_moe", "qwen3_moe", "glm4_moe", "qwen3_next", "ernie4_5_moe", "hunyuan_v1_moe", "olmoe", "granitemoe",
)  # fmt: skip


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def load(folder: Path):
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def trained(base: Path, folder: Path, **settings: object):
    """Return a model with an adapter of random numbers, whose folder is written as a training writes it."""
    model = load(base)
    added = add_adapter(model, AdapterSettings(**({"kind": "lora", "rank": 3} | settings)))
    generator = torch.Generator().manual_seed(1)
    masters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert masters
    for weight in masters.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    folder.mkdir()
    write_adapter_config(
        folder, {"base_model_name_or_path": str(base), **added.config}, AdapterBase(name=str(base))
    )
    save_file({file_name(name): weight.detach() for name, weight in masters.items()}, folder / WEIGHTS_FILE)
    return model


SHAPES = {
    "plain": ("llama", {"alpha": 7, "rslora": True, "dropout": 0.1}),
    "dora": ("llama", {"kind": "dora", "target_modules": ("q_proj", "up_proj")}),
    "experts": ("mixtral", {"experts": True}),
    "layers that peft takes for experts": (
        "deepseek_v3",
        {"target_modules": ("gate_proj", "q_a_proj"), "dropout": 0.1},
    ),
    "both": ("deepseek_v3", {"experts": True}),
    "experts in a parameter called weight": ("granitemoe", {"experts": True}),
    "lists": ("gemma3n_text", {}),
}


@pytest.mark.parametrize(("family", "settings"), SHAPES.values(), ids=SHAPES.keys())
def test_shape_that_is_read_from_a_folder_makes_an_adapter_for_its_numbers(tmp_path, family, settings):
    base, folder = build_tiny_family(family, tmp_path / "base"), tmp_path / "adapter"
    model = trained(base, folder, **settings)
    shape = read_shape(folder)
    asked = AdapterSettings(**({"kind": "lora", "rank": 3} | settings))
    for name in ("kind", "rank", "alpha", "rslora", "experts", "dropout"):
        assert getattr(shape, name) == getattr(asked, name)
    again = load(base)
    config = add_adapter(again, AdapterSettings(**asdict(shape))).config
    fresh = add_adapter(load(base), asked).config
    assert config == fresh
    set_adapter(again, folder)
    assert torch.equal(logits_of(again), logits_of(model))
    assert all((".lora_" in name) == weight.requires_grad for name, weight in again.named_parameters())


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
        )
    return logits_of(model)


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_all_the_same(model, base: Path, folder: Path) -> None:
    expected = logits_of(model)
    assert apart(logits_of(load(base)), expected) > 10 * LIMIT
    assert apart(by_peft(base, folder), expected) < LIMIT
    again = load(base)
    load_adapter(again, folder)
    assert torch.equal(logits_of(again), expected)
    merged = merge_adapter(folder, base=base)
    assert apart(logits_of(merged), expected) < LIMIT
    assert merged.state_dict().keys() == load(base).state_dict().keys()


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*AUTO, *slow(MORE_AUTO)])
def test_auto_trains_what_is_read_back_merged_and_opened_by_peft(tmp_path, family, kind):
    base = build_tiny_family(family, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", kind=kind)
    check_all_the_same(model, base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("phimoe", "router"),
        ("llama4_text", "router"),
        ("hunyuan_v1_moe", "wg"),
        ("mamba", "out_proj"),
        ("mamba", "dt_proj"),
        ("deepseek_v4", "o_a_proj"),
        ("zamba2", "q_proj"),
    ],
)
def test_layer_that_cannot_have_an_adapter_is_left_by_auto_and_refused_by_name(tmp_path, family, layer):
    base = build_tiny_family(family, tmp_path / "base")
    model = load(base)
    add_adapter(model, AdapterSettings(kind="lora", rank=2))
    assert not any(f".{layer}.lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(UsageError, match="cannot have an adapter"):
        add_adapter(load(base), AdapterSettings(kind="lora", target_modules=(layer,)))


def test_layer_that_peft_takes_for_experts_has_lora_and_no_dora(tmp_path):
    base = build_tiny_family("deepseek_v3", tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules=("gate_proj",), dropout=0.1)
    assert {name.split(".lora_")[0].rpartition(".")[0] for name, w in model.named_parameters() if w.requires_grad} == {
        "model.layers.0.mlp", *(f"model.layers.{index}.mlp.shared_experts" for index in (1, 2, 3))
    }  # fmt: skip
    check_all_the_same(model, base, tmp_path / "adapter")
    with pytest.raises(UsageError, match="DoRA"):
        add_adapter(load(base), AdapterSettings(kind="dora", target_modules=("gate_proj",)))


@pytest.mark.parametrize("family", [*WITH_EXPERTS, *slow(MORE_WITH_EXPERTS)])
def test_experts_have_an_adapter_each_that_peft_opens_and_that_merges(tmp_path, family):
    base = build_tiny_family(family, tmp_path / "base")
    fresh = load(base)
    before = logits_of(fresh)
    add_adapter(fresh, AdapterSettings(kind="lora", rank=3, experts=True))
    assert torch.equal(logits_of(fresh), before)
    model = trained(base, tmp_path / "adapter", experts=True)
    check_all_the_same(model, base, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", *slow(["gpt_oss"])])
def test_names_in_the_file_are_those_that_peft_gives(tmp_path, family):
    base = build_tiny_family(family, tmp_path / "base")
    trained(base, tmp_path / "adapter", experts=True)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    known = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    config = LoraConfig(
        r=3, target_modules=known["target_modules"], target_parameters=known["target_parameters"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model_state_dict(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_reach_both_matrices_of_each_expert(tmp_path, family):
    base = build_tiny_family(family, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", experts=True, target_modules=("q_proj",))
    model(input_ids=torch.arange(64).view(1, -1), use_cache=False).logits.square().sum().backward()
    matrices = {n: w for n, w in model.named_parameters() if ".experts." in n and w.requires_grad}
    assert len(matrices) == 4 * 2 * 2  # layers, parameters, matrices
    for name, weight in matrices.items():
        gradient = (
            weight.grad.view(4, 3, -1) if "lora_A" in name else weight.grad.view(-1, 3, 4).permute(2, 1, 0)
        )
        assert (gradient.abs().amax(dim=(1, 2)) > 0).all(), name


@pytest.fixture
def experts(tmp_path: Path) -> tuple[Path, Path]:
    base = build_tiny_family("mixtral", tmp_path / "base")
    trained(base, tmp_path / "adapter", experts=True)
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("ending", [".lora_A.weight", ".lora_B.weight", ""])
@pytest.mark.parametrize("wrapper", ["experts", "experts.base_layer"])
def test_tensor_of_experts_that_is_missing_is_named(experts, wrapper, ending):
    base, folder = experts
    tensors = load_file(folder / WEIGHTS_FILE)
    gone = f"layers.2.mlp.{wrapper}.lora_" if not ending else f"layers.2.mlp.{wrapper}{ending}"
    kept = {name: tensor for name, tensor in tensors.items() if gone not in name}
    assert len(kept) == len(tensors) - (1 if ending else 2)
    save_file(kept, folder / WEIGHTS_FILE)
    with pytest.raises(MismatchError, match="lacks tensors"):
        load_adapter(load(base), folder)


def test_tensors_of_two_experts_that_are_swapped_change_the_logits(experts):
    base, folder = experts
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    before = logits_of(merge_adapter(folder, base=base))
    tensors[name] = tensors[name].view(4, 3, -1)[[1, 0, 2, 3]].reshape(12, -1)
    save_file(tensors, folder / WEIGHTS_FILE)
    assert apart(before, logits_of(merge_adapter(folder, base=base))) > 10 * LIMIT


def test_parameters_that_the_model_lacks_or_that_are_no_names_are_refused(experts):
    base, folder = experts
    known = json.loads((folder / CONFIG_FILE).read_text())["target_parameters"]
    edit(folder, target_parameters=[*known, "experts.nowhere"])
    with pytest.raises(MismatchError, match=r"experts\.nowhere"):
        load_adapter(load(base), folder)
    edit(folder, target_parameters=known[:1])
    with pytest.raises(MismatchError):
        load_adapter(load(base), folder)


def test_experts_are_refused_where_there_are_none(tmp_path):
    base = build_tiny_family("llama", tmp_path / "base")
    with pytest.raises(UsageError, match=r"adapter\.experts"):
        add_adapter(load(base), AdapterSettings(kind="lora", experts=True))


@pytest.mark.parametrize(
    ("other", "word"),
    [({"kind": "dora"}, "dora"), ({"dropout": 0.1}, "dropout"), ({"quantize": "4bit"}, "4bit")],
)
def test_what_experts_do_not_go_with_is_refused_by_name(other, word):
    with pytest.raises(ValueError, match=rf"experts is set.*{word}"):
        AdapterSettings(**({"kind": AdapterKind.LORA, "experts": True} | other))
