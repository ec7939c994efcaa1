"""A written configuration says the same to readers of the older form: what transformers 4 read, from the keys it read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.modeling.formats.older_config import with_keys_of, with_older_keys, with_older_tokenizer_keys
from sftcli.modeling.load import load_model
from tests.support.tiny_model import build_tiny_model

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
_LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
# Kind of model -> what a file of transformers 4 says of positions that are not the default ones.
OLDER = [
    ("llama", {"rope_theta": 100000.0}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    ("qwen2", {"rope_theta": 1000000.0, "rope_scaling": _YARN}),
    ("gemma", {"rope_theta": 12345.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("phi", {"rope_theta": 12345.0, "partial_rotary_factor": 0.75}),
    ("phi3", {"rope_theta": 12345.0, "original_max_position_embeddings": 2048, "rope_scaling": _LONG}),
    ("stablelm", {"rope_theta": 12345.0, "partial_rotary_factor": 0.75}),
    ("gpt_neox", {"rotary_emb_base": 12345.0, "rotary_pct": 0.75}),
    ("gemma3_text", {"rope_theta": 12345.0, "rope_local_base_freq": 777.0}),
    ("gemma3_text", {"rope_theta": 12345.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3n_text", {"rope_theta": 12345.0, "rope_local_base_freq": 777.0}),
    ("modernbert-decoder", {"global_rope_theta": 12345.0, "local_rope_theta": 777.0}),
    ("olmo3", {"rope_theta": 12345.0, "rope_scaling": _YARN}),
    ("qwen2_vl_text", {"rope_theta": 12345.0, "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}),
]  # fmt: skip


def _load(source: Path) -> PreTrainedModel:
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def _written(config: PreTrainedConfig) -> dict[str, object]:
    return json.loads(config.to_json_string(use_diff=True))


@pytest.mark.parametrize(("kind", "older"), OLDER)
def test_both_forms_are_written_and_agree(kind: str, older: dict[str, object]) -> None:
    config = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(older)))
    content = with_older_keys(_written(config))
    for key, value in older.items():
        found = content[key]
        if key == "rope_scaling":
            assert isinstance(found, dict)
            assert found.get("type", found.get("rope_type")) in (value.get("type"), value.get("rope_type"))
            found = {name: found.get(name) for name in value if name not in ("type", "rope_type")}
            value = {name: given for name, given in value.items() if name not in ("type", "rope_type")}
        assert found == value, key
    again, before = (
        _written(CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(content)))),
        _written(config),
    )
    assert {key: again[key] for key in before} == before


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_vl", "llama4"])
def test_a_part_of_a_larger_model_has_both_forms_too(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    content = with_older_keys(_written(config))
    assert content["text_config"]["rope_theta"]
    assert _written(CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(content)))) == _written(config)


def test_positions_that_are_not_scaled_have_no_scaling() -> None:
    assert "rope_scaling" not in with_older_keys(_written(CONFIG_MAPPING["llama"]()))


def test_what_had_no_older_form_is_left_as_it_is() -> None:
    content = _written(CONFIG_MAPPING["gemma4_text"]())
    assert with_older_keys(content) == content


def test_kinds_of_layers_have_the_names_that_both_read() -> None:
    config = CONFIG_MAPPING["granitemoehybrid"](num_hidden_layers=2, layer_types=["mamba", "full_attention"])
    content = with_older_keys(_written(config))
    assert content["layer_types"] == ["mamba", "attention"]
    assert _written(CONFIG_MAPPING["granitemoehybrid"].from_dict(content)) == _written(config)


@pytest.mark.parametrize(("kind", "key", "value"), [
    ("zamba", "layers_block_type", ["mamba", "hybrid"] * 38),
    ("zamba2", "layers_block_type", ["mamba", "hybrid"] * 27), ("qwen3_moe", "num_experts", 4),
])  # fmt: skip
def test_keys_that_have_other_names_now_are_read_in_both(kind: str, key: str, value: object) -> None:
    config = CONFIG_MAPPING[kind].from_dict({key: value})
    content = with_older_keys(_written(config))
    assert content[key] == value
    assert _written(CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(content)))) == _written(config)


def test_infinity_is_a_number_to_older_readers() -> None:
    content = with_older_keys(_written(CONFIG_MAPPING["mamba2"]()))
    assert json.loads(json.dumps(content))["time_step_limit"] == [0.0, float("inf")]


def test_keys_of_the_source_that_only_others_read_are_kept() -> None:
    source = {
        "model_type": "a", "theirs": 1, "kept": 2, "dtype": "float16", "quantization_config": {}, "_attn": "x",
        "text_config": {"model_type": "b", "theirs": 3}, "other_config": {"theirs": 4},
    }  # fmt: skip
    config = {"model_type": "a", "kept": 5, "text_config": {"model_type": "b"}, "other_config": {"own": 1}}
    assert with_keys_of(source, config) == {
        "model_type": "a", "theirs": 1, "kept": 5, "text_config": {"model_type": "b", "theirs": 3},
        "other_config": {"own": 1},
    }  # fmt: skip
    assert with_keys_of(source | {"model_type": "c"}, config) == config


def test_a_saved_folder_holds_both_forms_and_every_key_of_its_source(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    path = source / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    path.write_text(
        json.dumps(content | {"rope_theta": 50000.0, "rope_scaling": None, "of_another_program": 7})
    )
    save_model_folder(_load(source), source=source, folder=tmp_path / "final")
    written = json.loads((tmp_path / "final" / "config.json").read_text())
    assert written["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}
    assert (written["rope_theta"], written["rope_scaling"], written["of_another_program"]) == (
        50000.0,
        None,
        7,
    )
    assert AutoConfig.from_pretrained(tmp_path / "final").rope_parameters["rope_theta"] == 50000.0


def test_a_saved_tokenizer_asks_for_no_input_that_the_model_does_not_take(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    save_model_folder(_load(source), source=source, folder=tmp_path / "final")
    content = json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    assert AutoTokenizer.from_pretrained(tmp_path / "final")("a").keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("content", "takes_types", "changed"), [
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, True, {}),
    ({"tokenizer_class": "GPT2Tokenizer"}, False, {}),
    ({"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"]}, False, {}),
    ({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>", "<b>"]}, True, {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>", "<b>"],
        "extra_special_tokens": None}),
    ({"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {"image_token": "<a>"}}, False, {}),
])  # fmt: skip
def test_a_tokenizer_is_named_as_older_readers_know_it(
    content: dict[str, object], takes_types: bool, changed: dict[str, object]
) -> None:
    wanted = {key: value for key, value in (content | changed).items() if value is not None}
    assert with_older_tokenizer_keys(content, takes_types=takes_types) == wanted
