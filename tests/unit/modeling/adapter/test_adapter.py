"""Adapters in memory and in folders: which layers they are on, what merging gives, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.errors import ConsentError, DataError, MismatchError, NotFoundError, UsageError
from sftcli.modeling.adapter.adapter import add_adapter, check_base, load_adapter, merge_adapter
from sftcli.modeling.adapter.folder import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, read_base, read_shape
from sftcli.modeling.adapter.targets import choose_targets, short_names
from sftcli.modeling.formats.identity import numbers_hash
from sftcli.modeling.load import load_model
from tests.support.foreign_adapter import IDS, foreign_adapter
from tests.support.tiny_model import build_tiny_model, tiny_config
from tests.support.tiny_modern import tiny_modern
from tests.support.training import tiny_llama

CPU = torch.device("cpu")
BODY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "base", tie=request.param)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tied")


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_model(folder, dtype=dtype, device=CPU)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def target_names(model, wanted) -> list[str]:
    return short_names(choose_targets(model, wanted).layers, [name for name, _ in model.named_modules()])


FORMS = {
    "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 4, "target_modules": r".*layers\.1\.mlp\..*_proj"},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": BODY, "use_rslora": True},
    "dora": {"r": 4, "target_modules": BODY, "use_dora": True},
    "ranks of their own": {"r": 4, "target_modules": BODY, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_folder_that_peft_wrote_gives_the_same_logits_merged_and_not(base, tmp_path, form):
    folder = foreign_adapter(base, tmp_path / "adapter", **form)
    expected = load_file(folder / "expected")["logits"]
    model = load(base)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    load_adapter(model, folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    merged = merge_adapter(folder, base=base)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == load(base).state_dict().keys()
    assert not any("lora" in name or "peft" in name for name in vars(merged))


def test_untied_head_may_have_an_adapter_or_be_saved_whole(tmp_path):
    base = build_tiny_model(tmp_path / "base", tie=False)
    for name, form in {
        "adapter": {"target_modules": ["lm_head", "q_proj"]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }.items():
        folder = foreign_adapter(base, tmp_path / name, **form)
        expected = load_file(folder / "expected")["logits"]
        torch.testing.assert_close(logits(merge_adapter(folder, base=base)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_bfloat16_model_is_the_float32_one_rounded_once(tied, tmp_path, form):
    load(tied, torch.bfloat16).save_pretrained(tied)  # as models are stored
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS[form])
    exact = merge_adapter(folder, base=tied).state_dict()
    for name, tensor in merge_adapter(folder, base=tied, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_auto_means_every_linear_layer_but_the_head(base):
    assert target_names(load(base), ["auto"]) == BODY


def test_auto_finds_the_layers_of_a_modern_lm():
    assert target_names(tiny_modern(), ["auto"]) == ["gate", "k_proj", "out_proj", "proj", "q_proj", "v_proj"]


def test_layer_that_is_not_there_is_named_with_the_nearest(tied):
    with pytest.raises(UsageError, match="'q_prj'") as caught:
        target_names(load(tied), ["q_prj"])
    assert "'q_proj'" in caught.value.hint
    with pytest.raises(UsageError, match="'embed_tokens'"):
        target_names(load(tied), ["embed_tokens"])


def test_tied_head_is_refused_and_an_untied_one_taken(tmp_path):
    assert target_names(load(build_tiny_model(tmp_path / "u", tie=False)), ["lm_head"]) == ["lm_head"]
    with pytest.raises(UsageError, match="shares its weights"):
        target_names(load(build_tiny_model(tmp_path / "t")), ["lm_head"])


@pytest.mark.parametrize("kind", [AdapterKind.LORA, AdapterKind.DORA])
def test_new_adapter_changes_nothing_yet_and_alone_trains(tied, kind):
    model, before = load(tied), logits(load(tied))
    add_adapter(model, AdapterSettings(kind=kind, rank=4))
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    assert all((".lora_" in name) == p.requires_grad for name, p in model.named_parameters())


def test_base_is_known_by_its_numbers_and_not_by_how_they_are_stored(tied, tmp_path):
    wide = load(tied, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        wide.to(dtype).save_pretrained(tmp_path / str(dtype))
    contents = [numbers_hash(tmp_path / str(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert contents[0] == contents[1] != numbers_hash(tied)


def test_other_base_is_refused(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    check_base(folder, tied)  # says nothing: the folder does not know its base's content
    (folder / BASE_FILE).write_text(json.dumps({"name": "x", "content": numbers_hash(tied)}))
    check_base(folder, tied)
    other = build_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="trained on other weights of x"):
        merge_adapter(folder, base=other)


def test_base_of_other_shapes_is_refused_even_where_its_content_is_not_known(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    model = LlamaForCausalLM(tiny_config())
    small = LlamaForCausalLM(type(model.config)(**(model.config.to_dict() | {"intermediate_size": 48})))
    with pytest.raises(MismatchError, match="down_proj"):
        load_adapter(small, folder)
    shallow = LlamaForCausalLM(type(model.config)(**(model.config.to_dict() | {"num_hidden_layers": 1})))
    with pytest.raises(MismatchError, match=r"no layer model\.layers\.1"):
        load_adapter(shallow, folder)


# What a folder may not ask for


@pytest.mark.parametrize(
    "change",
    [
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"alpha_pattern": {"q_proj": 2}},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa"},
        {"a key of the future": 1},
        {"peft_type": "IA3"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_part_of_peft_that_is_not_known_is_refused_by_name(tied, tmp_path, change):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    edit(folder / CONFIG_FILE, **change)
    with pytest.raises(UsageError, match=next(iter(change))):
        load_adapter(load(tied), folder)


@pytest.mark.parametrize("change", [{"lora_alpha": "32"}, {"lora_alpha": -1}, {"use_dora": "yes"}])
def test_value_of_another_type_is_refused(tied, tmp_path, change):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    edit(folder / CONFIG_FILE, **change)
    with pytest.raises(DataError, match=next(iter(change))):
        load_adapter(load(tied), folder)


def test_pattern_that_never_ends_is_not_compiled(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    edit(folder / CONFIG_FILE, target_modules="(([a-z_.0-9])+)+!", rank_pattern={"(([a-z_.0-9])+)+!": 2},
         exclude_modules="(([a-z_.0-9])+)+!")  # fmt: skip
    model = load(tied)
    load_adapter(model, folder)
    torch.testing.assert_close(logits(model), load_file(folder / "expected")["logits"], atol=1e-6, rtol=0)


def test_pickle_weights_are_refused_and_missing_or_cut_ones_named(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="bytes long"):
        load_adapter(load(tied), folder)
    path.unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS_FILE):
        load_adapter(load(tied), folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConsentError, match="pickle file"):
        load_adapter(load(tied), folder)


def test_missing_and_foreign_tensors_are_named(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(MismatchError, match="lacks tensors"):
        load_adapter(load(tied), folder)
    save_file(tensors | {"base_model.model.nowhere": torch.ones(1)}, path)
    with pytest.raises(MismatchError, match="nowhere"):
        load_adapter(load(tied), folder)


def test_base_is_read_from_peft_where_the_folder_was_made_elsewhere(tied, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    assert read_base(folder).name == str(tied)
    edit(folder / CONFIG_FILE, base_model_name_or_path=None)
    with pytest.raises(DataError, match="does not say which model"):
        read_base(folder)


@pytest.mark.parametrize(
    ("base", "why"), [("a/" * 2100, "too long"), ("a" * 256, "too long"), ("a\0b", "NUL")]
)
def test_a_base_that_can_be_no_path_is_refused_with_its_file(tied, base: str, why: str, tmp_path):
    folder = foreign_adapter(tied, tmp_path / "adapter", **FORMS["lora"])
    edit(folder / CONFIG_FILE, base_model_name_or_path=base)
    with pytest.raises(DataError, match=f"adapter_config.json names no model in base_model_.*{why}"):
        read_base(folder)


def test_what_gets_no_adapter_is_told_as_shares_of_the_layers():
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads, num_local_experts=4))
    alone = add_adapter(model, AdapterSettings(kind="lora", rank=2)).left_alone
    attention, experts, router = 4 * 16 * 16, 4 * 3 * 16 * 32, 4 * 16
    total = attention + experts + router
    assert alone.kinds == {"experts": experts / total, "routers": router / total}
    assert alone.share == pytest.approx((experts + router) / total)
    assert add_adapter(tiny_llama(), AdapterSettings(kind="lora", rank=2)).left_alone.share == 0


def test_an_adapter_of_numbers_that_are_not_finite_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(tied, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(DataError, match=r"adapter_model\.safetensors holds non-finite values"):
        load_adapter(load(tied), folder)


def test_an_adapter_of_rank_0_is_refused(tied: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(tied, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    tensors = load_file(folder / WEIGHTS_FILE)
    empty = {
        name: tensor[:0] if "lora_A" in name else tensor[:, :0].clone() for name, tensor in tensors.items()
    }
    save_file(empty, folder / WEIGHTS_FILE)
    edit(folder / CONFIG_FILE, r=0)
    with pytest.raises(DataError, match="cannot be put into the model"):
        load_adapter(load(tied), folder)
    with pytest.raises(DataError, match="r is 0, expected a whole number above 0"):
        read_shape(folder)
