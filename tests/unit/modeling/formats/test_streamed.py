"""A model folder that is written one tensor at a time is the one that transformers writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sftcli.errors import StorageError
from sftcli.modeling.formats import folder_write, streamed
from sftcli.modeling.formats.folder_write import save_model_folder
from tests.support.tiny_model import build_tiny_model, tiny_config


def changed(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return other numbers for the parameters of ``model``, in a file."""
    torch.manual_seed(5)
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def assert_same_files(ours: Path, theirs: Path) -> None:
    found, expected = written(ours), written(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    names = [path.name for path in sorted(theirs.iterdir()) if path.suffix != ".safetensors"]
    assert names == [path.name for path in sorted(ours.iterdir()) if path.suffix != ".safetensors"]
    for name in names:
        if name != "model.safetensors.index.json":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = build_tiny_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("most_bytes", [10**9, 20_000])
def test_streamed_folder_is_that_of_transformers(tmp_path, source, monkeypatch, most_bytes):
    monkeypatch.setattr(folder_write, "_SHARD_BYTES", most_bytes)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = changed(model, tmp_path)
    for name in ("ours", "theirs"):
        save_model_folder(
            model, source=source, folder=tmp_path / name, weights=weights, streams=name == "ours"
        )
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) == 1 or most_bytes < 10**9
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def test_at_most_one_tensor_is_converted_at_a_time(tmp_path, source, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights, alive = changed(model, tmp_path), []
    plain = folder_write._rounded

    def watched(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        import weakref

        alive[:] = [one for one in alive if one() is not None]
        assert len(alive) <= 1
        made = plain(name, tensor, dtype).clone()
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(folder_write, "_rounded", watched)
    save_model_folder(model, source=source, folder=tmp_path / "out", weights=weights, streams=True)


def test_untied_head_is_written(tmp_path):
    torch.manual_seed(0)
    source = build_tiny_model(tmp_path / "source")
    LlamaForCausalLM(tiny_config(tie=False)).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = changed(model, tmp_path)
    save_model_folder(model, source=source, folder=tmp_path / "out", weights=weights, streams=True)
    assert torch.equal(written(tmp_path / "out")["lm_head.weight"], weights["lm_head.weight"])


def test_experts_that_files_hold_apart_are_left_to_transformers(tmp_path):
    torch.manual_seed(0)
    source = build_tiny_model(tmp_path / "source")
    values = tiny_config().to_diff_dict() | {"num_local_experts": 4}
    for key in ("model_type", "architectures"):
        values.pop(key, None)
    MixtralForCausalLM(MixtralConfig(**values)).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = changed(model, tmp_path)
    assert (
        streamed.names_to_stream(model, {name: one.shape for name, one in model.state_dict().items()}) is None
    )
    for name in ("ours", "theirs"):
        save_model_folder(
            model, source=source, folder=tmp_path / name, weights=weights, streams=name == "ours"
        )
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_tensor_that_is_left_out_is_an_error_and_the_folder_not_there(tmp_path, source, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = folder_write.names_to_stream
    monkeypatch.setattr(folder_write, "names_to_stream", lambda *about: names(*about)[1:])
    with pytest.raises(StorageError, match="is missing"):
        save_model_folder(
            model, source=source, folder=tmp_path / "out", weights=changed(model, tmp_path), streams=True
        )
    assert not (tmp_path / "out").exists()
