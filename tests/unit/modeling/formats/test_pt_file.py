"""Files that must not be trusted, or do not fit: one error, and nothing of them runs."""

from pathlib import Path

import pytest
import torch

from sftcli.errors import DataError, MismatchError
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
