"""Files that must not be trusted, or do not fit: one error, and nothing of them runs."""

import math
import time
from pathlib import Path

import pytest
import torch

from sftcli.errors import DataError, MismatchError
from sftcli.modeling.formats.pt_config import CONFIG_KEYS
from sftcli.modeling.formats.pt_file import read_pt
from tests.support.tiny_modern import build_tiny_pt


class Opener:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def content(tmp_path) -> dict:
    return torch.load(build_tiny_pt(tmp_path / "good.pt"), weights_only=True)


def refused(content, tmp_path, kind) -> str:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(kind) as caught:
        read_pt(tmp_path / "bad.pt")
    return caught.value.message


def test_malicious_file_is_refused_and_runs_nothing(content, tmp_path):
    ran = tmp_path / "ran"
    assert "could run code" in refused(content | {"run_name": Opener(ran)}, tmp_path, DataError)
    assert not ran.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, share):
    whole = build_tiny_pt(tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"cut\.pt"):
        read_pt(tmp_path / "cut.pt")


def test_misfit_names_the_key_and_both_shapes(content, tmp_path):
    content["model_state"]["blocks.1.attn.k_proj.weight"] = torch.zeros(8, 32)
    message = refused(content, tmp_path, MismatchError)
    assert "blocks.1.attn.k_proj.weight is (8, 32), its config says (32, 32)" in message


def test_missing_and_left_over_tensors_are_named(content, tmp_path):
    moved = content["model_state"].pop("final_norm.weight")
    assert "lacks final_norm.weight (32,)" in refused(content, tmp_path, MismatchError)
    content["model_state"] |= {"final_norm.weight": moved, "extra.weight": moved}
    assert "extra.weight (32,)" in refused(content, tmp_path, MismatchError)


def test_experts_unknown_keys_and_other_dictionaries_are_refused(content, tmp_path):
    config = content["config"]
    assert "use_moe" in refused(content | {"config": config | {"use_moe": True}}, tmp_path, MismatchError)
    assert "'color'" in refused(content | {"config": config | {"color": 1}}, tmp_path, MismatchError)
    assert "'scheduler'" in refused(content | {"scheduler": {}}, tmp_path, DataError)
    assert "model_state" in refused({"weights": 1}, tmp_path, DataError)


def test_prefix_of_a_compiled_model_is_stripped(content, tmp_path):
    state = {f"_orig_mod.{name}": tensor for name, tensor in content["model_state"].items()}
    torch.save(content | {"model_state": state}, tmp_path / "compiled.pt")
    assert read_pt(tmp_path / "compiled.pt").model_state.keys() == content["model_state"].keys()


_FLAGS = ("use_rope", "use_attention_sinks", "use_swiglu", "use_gqa", "use_moe", "tie_embeddings")
_NO_NUMBERS = ("x", True, None, [1], math.nan, math.inf, 2**1000, torch.ones(2))
NONSENSE = {
    **dict.fromkeys(("vocab_size", "d_model", "n_layers", "n_heads", "ffn_hidden_size", "max_seq_len"), (*_NO_NUMBERS, 0, -1, 1.5, 2**30)),
    "rmsnorm_eps": (*_NO_NUMBERS, -1e-5, 1),
    "dropout": (*_NO_NUMBERS, -1, 5),
    "initializer_range": (*_NO_NUMBERS, -0.02),
    "rope_theta": (*_NO_NUMBERS, 0, -1.0),
    "rope_scaling": ("x", True, [1], math.nan, math.inf, 2**1000, torch.ones(2), {"type": "linear"}, 0, -1.0),
    **dict.fromkeys(_FLAGS, ("x", "", 0, 1, None, [], torch.ones(2))),
    "num_attention_sinks": (*_NO_NUMBERS, -1, 0.5),
    "swiglu_multiplier": (*_NO_NUMBERS, 0, -1.0),
    "gqa_groups": ("x", True, [1], math.nan, 2**1000, torch.ones(2), 0, -1, 1.5),
    "moe_config": ("x", 0, [1], torch.ones(2)),
}  # fmt: skip


def test_each_key_has_its_nonsense():
    assert NONSENSE.keys() == {*CONFIG_KEYS}


@pytest.mark.parametrize("key", NONSENSE)
def test_value_that_no_model_can_have_is_refused_by_its_key(content, tmp_path, key):
    for value in NONSENSE[key]:
        message = refused(content | {"config": content["config"] | {key: value}}, tmp_path, MismatchError)
        assert f"config.{key} is " in message, value
        assert len(message.splitlines()) == 1


def test_whole_numbers_in_place_of_fractions_are_taken(content, tmp_path):
    whole = {
        "dropout": 0,
        "rope_theta": 10000,
        "rope_scaling": 2,
        "swiglu_multiplier": 2,
        "moe_config": {"experts": 4},
    }
    torch.save(content | {"config": content["config"] | whole}, tmp_path / "whole.pt")
    assert read_pt(tmp_path / "whole.pt").config["rope_scaling"] == 2


def test_layers_that_the_weights_have_not_are_refused_before_they_are_built(content, tmp_path):
    began = time.monotonic()
    message = refused(content | {"config": content["config"] | {"n_layers": 2**24}}, tmp_path, MismatchError)
    assert "config says 16777216 layers, the weights hold 2" in message
    assert time.monotonic() - began < 5


def test_weights_of_another_kind_are_an_error_with_the_file_s_name(content, tmp_path):
    content["model_state"]["token_embed.weight"] = torch.zeros(514, 32).to_sparse()
    assert "bad.pt" in refused(content, tmp_path, DataError)
