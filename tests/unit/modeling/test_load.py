import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from sftcli.config.schema.adapter import Quantize
from sftcli.config.schema.run import Attention
from sftcli.config.schema.training import Checkpointing
from sftcli.errors import ConsentError, DataError, MismatchError, NotFoundError, UsageError
from sftcli.modeling.attention import attention_of, is_named, use_named_attention
from sftcli.modeling.formats.folder_write import copy_tokenizer, save_model_folder, write_model_files
from sftcli.modeling.formats.identity import numbers_hash
from sftcli.modeling.formats.sizes import tensor_shapes
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.load import count_parameters, load_model, own_attention, refuse_fused_experts
from tests.support.tiny_experts import build_experts
from tests.support.tiny_model import build_tiny_model

REPO = Path(__file__).parents[3]
CPU = torch.device("cpu")


def _load(folder: Path, dtype: torch.dtype = torch.float32, **options: object):
    return load_model(folder, dtype=dtype, device=CPU, **options)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Loading


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_that_four_bits_leave_alone_are_refused_by_name_and_share(tmp_path, family):
    model = build_experts(family)
    model.save_pretrained(tmp_path)
    fused = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    named = f"{fused / sum(weight.numel() for weight in model.parameters()):.0%} of the weights of {type(model).__name__}"
    with pytest.raises(UsageError, match=named) as refused:
        refuse_fused_experts(tmp_path, Quantize.FOUR_BIT)
    assert refused.value.location.key == "adapter.quantize"


def test_models_of_linear_layers_take_four_bits(tmp_path):
    refuse_fused_experts(build_tiny_model(tmp_path), Quantize.FOUR_BIT)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_loaded_in_the_dtype_that_is_asked_for(
    tmp_path: Path, tie: bool, dtype: torch.dtype
) -> None:
    stored = load_file(build_tiny_model(tmp_path, tie=tie) / "model.safetensors")
    model = _load(tmp_path, dtype)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in stored.items())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


def test_a_tied_tensor_counts_once(tmp_path: Path) -> None:
    embedding = 514 * 32
    tied, _ = count_parameters(_load(build_tiny_model(tmp_path / "tied")))
    untied, _ = count_parameters(_load(build_tiny_model(tmp_path / "untied", tie=False)))
    assert untied - tied == embedding


def test_frozen_tensors_do_not_count_as_trainable(tiny: Path) -> None:
    model = _load(tiny)
    model.get_input_embeddings().weight.requires_grad_(False)
    total, trainable = count_parameters(model)
    assert total - trainable == 514 * 32


def test_the_attention_is_the_one_that_is_asked_for(tiny: Path) -> None:
    for name in (Attention.EAGER, Attention.SDPA):
        model = _load(tiny, attention=name)
        assert attention_of(model) == name
        assert not attend_by_document(model)  # nothing takes over
        assert attention_of(model) == name
        assert own_attention(model) == ""  # nobody chose it but the user
    assert attention_of(_load(tiny)) == "sdpa"
    assert attend_by_document(_load(tiny))


def test_flash_attention_waits_for_weights_of_16_bits_and_is_no_other_one(tiny: Path) -> None:
    model = _load(tiny, attention=Attention.FLASH_2)
    assert is_named(model)
    with pytest.raises(
        UsageError, match=r"'flash_attention_2' cannot be used here: .*training\.precision=bf16"
    ):
        use_named_attention(model)
    with pytest.raises(UsageError, match="'flash_attention_2' cannot be used here") as caught:
        use_named_attention(model.bfloat16())  # neither the package nor a device is here
    assert "model.attention" in caught.value.hint
    assert attention_of(model) == "sdpa"


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("_supports_sdpa", "sdpa"),
        ("_supports_flash_attn", "flash_attention_3"),
        ("_supports_flex_attn", "flex_attention"),
    ],
)
def test_an_attention_that_the_class_does_not_know_is_refused_by_name(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, flag, False)
    with pytest.raises(
        UsageError, match=f"attention '{name}' cannot be used here: LlamaForCausalLM does not know it"
    ):
        _load(tiny, attention=Attention(name))
    assert _load(tiny, attention=Attention.EAGER) is not None


def test_a_flash_kernel_that_a_class_does_not_list_is_not_replaced_by_one_that_it_does(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_compatible_flash_implementations", ["flash_attention_3"])
    with pytest.raises(
        UsageError, match="'flash_attention_2' cannot be used here: LlamaForCausalLM does not know it"
    ):
        _load(tiny, attention=Attention.FLASH_2)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "hqq", "torchao", "fp8", "compressed-tensors", "no-such-kind"]
)
def test_a_quantized_base_is_refused_by_its_kind_with_a_way_out(tiny: Path, method: str) -> None:
    _edit(tiny / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UsageError, match=rf"the weights are quantized \({method}\)") as caught:
        _load(tiny)
    assert "adapter.quantize=4bit" in caught.value.hint


def test_a_class_without_the_attention_of_torch_uses_its_own_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Gemma2ForCausalLM, "_supports_sdpa", False
    )  # as newer releases of transformers have it
    build_tiny_model(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=514, **shape, **heads)).save_pretrained(tmp_path)
    MambaForCausalLM(
        MambaConfig(vocab_size=514, hidden_size=32, num_hidden_layers=2, state_size=8)
    ).save_pretrained(tmp_path / "mamba")
    model = _load(tmp_path)
    assert model.config._attn_implementation == "eager"
    assert own_attention(model).startswith("Gemma2ForCausalLM has no sdpa: its own attention (eager) is used")
    assert own_attention(_load(tmp_path / "mamba")) == ""  # there is none


def test_gradient_checkpointing_changes_no_gradient(tiny: Path) -> None:
    gradients, passes = [], []
    for enabled in (False, True):
        how = Checkpointing.LAYERS if enabled else Checkpointing.OFF
        model = _load(tiny, checkpointing=how).train()
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, enabled=enabled: passes.append(enabled)
        )
        model(input_ids=torch.arange(12)[None], use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert passes == [False, True, True]
    assert all(torch.equal(plain, saved) for plain, saved in zip(*gradients, strict=True))


def test_missing_tensors_are_named_three_at_most(tiny: Path) -> None:
    _rewrite(
        tiny, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1.mlp" in n or "norm" in n]
    )
    with pytest.raises(
        MismatchError, match=r"lack tensors that .*config\.json requires: .* and 5 more"
    ) as caught:
        _load(tiny)
    assert caught.value.message.count("model.layers") == 3


def test_tensors_without_a_place_are_named(tiny: Path) -> None:
    _rewrite(tiny, lambda tensors: tensors.update({"model.layers.7.extra.weight": torch.zeros(2)}))
    with pytest.raises(MismatchError, match=r"does not define: model\.layers\.7\.extra\.weight"):
        _load(tiny)


def test_other_shapes_are_named_both_ways(tiny: Path) -> None:
    _edit(tiny / "config.json", intermediate_size=48)
    with pytest.raises(MismatchError) as caught:
        _load(tiny)
    assert "model.layers.0.mlp.down_proj.weight is (32, 64) instead of (32, 48)" in caught.value.message


def test_a_model_that_brings_code_is_refused_and_the_code_not_run(tiny: Path) -> None:
    canary = tiny / "canary"
    (tiny / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    _edit(tiny / "config.json", auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"})
    with pytest.raises(ConsentError, match=r"config\.json requires code that comes with the model"):
        _load(tiny)
    assert not canary.exists()


def test_a_model_of_unknown_kind_that_wants_code_is_refused(tiny: Path) -> None:
    _edit(tiny / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "own/repo--own.Model"})
    with pytest.raises(ConsentError, match=r"config\.json requires code that comes with the model"):
        _load(tiny)


def test_a_known_model_that_lists_code_without_bringing_it_loads_as_the_library_class(tiny: Path) -> None:
    _edit(tiny / "config.json", auto_map={"AutoModelForCausalLM": "own/repo--own.Model"})
    assert type(_load(tiny)).__name__ == "LlamaForCausalLM"


def test_a_model_of_unknown_kind_is_a_data_error(tiny: Path) -> None:
    _edit(tiny / "config.json", model_type="no-such-kind")
    with pytest.raises(DataError, match="cannot be loaded"):
        _load(tiny)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": 3}', "{}"])
def test_a_damaged_configuration_is_a_data_error(tiny: Path, content: str) -> None:
    (tiny / "config.json").write_text(content)
    with pytest.raises(DataError):
        _load(tiny)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 0}, "cannot be loaded: "),
        ({"num_attention_heads": "x"}, "expected int, got str"),
        ({"hidden_size": -32}, "negative dimension"),
        ({"hidden_size": 10**30}, "says hidden_size 100000... .31 digits."),
        ({"hidden_size": 10**400}, "says hidden_size 100000... .401 digits."),
        ({"hidden_act": "nope"}, "'nope' is missing or not known"),
        ({"pad_token_id": 100_000}, "Padding_idx"),
        ({"eos_token_id": "x"}, "expected|match"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a finite number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a number from 0 to below 1"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "rope_theta is 0, expected a number above 0",
        ),
        ({"attention_dropout": 5}, "attention_dropout is 5, expected a number from 0 to 1"),
        ({"head_dim": 0}, "cannot be loaded: "),
    ],
)
def test_a_configuration_that_computes_nothing_is_refused_by_name(
    tiny: Path, changes: dict[str, object], told: str
) -> None:
    _edit(tiny / "config.json", **changes)
    with pytest.raises(DataError, match=told) as caught:
        _load(tiny)
    assert str(tiny) in caught.value.message


def test_outputs_are_named_whatever_the_configuration_says(tiny: Path) -> None:
    expected = _load(tiny)(input_ids=torch.tensor([[5, 6]])).logits
    _edit(tiny / "config.json", return_dict=False)
    assert torch.equal(_load(tiny)(input_ids=torch.tensor([[5, 6]])).logits, expected)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"dtype": "F32", "shape": "abc", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**15, 10**15], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["a"]},
    ],
)
def test_a_header_that_describes_no_tensor_is_a_damaged_file(tiny: Path, entry: object) -> None:
    path = tiny / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"model.norm.weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    for read in (_load, tensor_shapes):
        with pytest.raises(DataError, match=r"damaged header: 'model\.norm\.weight' is no tensor"):
            read(tiny)


def test_a_stray_file_of_weights_is_not_read(tiny: Path) -> None:
    (tiny / "evil.safetensors").write_bytes(b"\0")
    assert "evil" not in tensor_shapes(tiny)
    assert numbers_hash(tiny)
    assert _load(tiny)


def test_a_folder_without_configuration_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(NotFoundError, match=r"config\.json is missing"):
        _load(tmp_path)


def test_pickle_weights_are_never_opened(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ConsentError, match="pickle file"):
        _load(tiny)


def test_loading_and_saving_write_nothing_to_the_terminal(tiny: Path) -> None:
    program = (
        "import torch; from pathlib import Path; from sftcli.modeling.load import *;"
        "from sftcli.modeling.formats.folder_write import *;"
        f"source = Path({str(tiny)!r}); cpu = torch.device('cpu');"
        "model = load_model(source, dtype=torch.float32, device=cpu);"
        "save_model_folder(model, source=source, folder=source.parent / 'out', stop_ids={2});"
        "import warnings; warnings.warn('from a library')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert (run.stdout, run.stderr) == ("", "")


def test_quiet_libraries_still_reach_a_log(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        quiet_libraries()
        logging.getLogger("transformers.anything").warning("told")
        warnings.warn("warned", UserWarning, stacklevel=1)
    assert "told" in caplog.text
    assert "warned" in caplog.text


# Saving


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_opens_with_plain_transformers_and_answers_alike(tmp_path: Path, tie: bool) -> None:
    source = build_tiny_model(tmp_path / "source", tie=tie)
    model = _load(source)
    save_model_folder(model, source=source, folder=tmp_path / "final", stop_ids={2})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    messages = [{"role": "user", "content": "Name the ferry."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    asked = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(opened.generate(ids, **asked), model.generate(ids, **asked))


def test_a_saved_model_loads_again_whole(tiny: Path, tmp_path: Path) -> None:
    model = _load(tiny)
    save_model_folder(model, source=tiny, folder=tmp_path / "final")
    again = _load(tmp_path / "final").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("stored", "asked", "written"), [
    (torch.float32, None, torch.float32),
    (torch.bfloat16, None, torch.bfloat16),
    (torch.float16, None, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_weights_are_saved_as_the_source_stores_them_unless_told(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None, written: torch.dtype
) -> None:
    source = build_tiny_model(tmp_path / "source", dtype=stored)
    model = _load(source)
    save_model_folder(model, source=source, folder=tmp_path / "final", dtype=asked)
    tensors = load_file(tmp_path / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {written}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == str(written).split(".")[1]
    assert model.dtype == torch.float32


def test_a_saved_folder_holds_these_files_and_no_word_of_this_machine(tiny: Path, tmp_path: Path) -> None:
    _edit(tiny / "config.json", _name_or_path=str(tiny))
    _edit(tiny / "tokenizer_config.json", name_or_path=str(tiny), is_local=True)
    save_model_folder(_load(tiny), source=tiny, folder=tmp_path / "final")
    files = sorted((tmp_path / "final").iterdir())
    assert [file.name for file in files] == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert not [file.name for file in files if str(tmp_path).encode() in file.read_bytes()]
    assert {file.stat().st_mode & 0o777 for file in files} == {files[1].stat().st_mode & 0o777}


@pytest.mark.parametrize(("stored", "trained", "written"), [
    (2, set(), 2), (2, {2}, 2), (0, {2}, [0, 2]), ([0, 5], {2, 5}, [0, 5, 2]), (None, {2}, 2),
])  # fmt: skip
def test_the_saved_stop_tokens_include_those_that_were_trained(
    tiny: Path, tmp_path: Path, stored: object, trained: set[int], written: object
) -> None:
    _edit(tiny / "generation_config.json", eos_token_id=stored)
    save_model_folder(_load(tiny), source=tiny, folder=tmp_path / "final", stop_ids=trained)
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"] == written


def test_sampling_settings_that_contradict_each_other_do_not_stop_a_save(tiny: Path, tmp_path: Path) -> None:
    model = _load(tiny)
    model.generation_config.temperature = 0.5  # without do_sample, transformers refuses to write this
    save_model_folder(model, source=tiny, folder=tmp_path / "final")
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text())["temperature"] == 0.5
    assert model.generation_config.temperature == 0.5


def test_an_older_folder_is_replaced_whole(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model-00001-of-00002.safetensors").write_bytes(b"old")
    save_model_folder(_load(tiny), source=tiny, folder=tmp_path / "final")
    assert not (tmp_path / "final" / "model-00001-of-00002.safetensors").exists()


def test_the_files_beside_the_weights_of_a_checkpoint_make_it_a_model(tiny: Path, tmp_path: Path) -> None:
    model = _load(tiny, torch.bfloat16)
    write_model_files(model, tmp_path, source=tiny, stop_ids={2})
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    save_file(masters, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 514


def test_every_chat_template_is_copied(tiny: Path, tmp_path: Path) -> None:
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "tools.jinja").write_text("x")
    (tmp_path / "to").mkdir()
    copy_tokenizer(tiny, tmp_path / "to")
    assert (tmp_path / "to" / "additional_chat_templates" / "tools.jinja").read_text() == "x"
