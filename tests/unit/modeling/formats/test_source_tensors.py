"""What a model folder holds is found in the model that was loaded from it, and comes back when it is saved."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, PreTrainedModel

from sftcli.modeling.formats.folder_write import save_model_folder, whole_state
from sftcli.modeling.formats.source_tensors import SourceTensors, check_names_come_back
from sftcli.modeling.formats.stored_tensors import copied_file_parts, in_parts, stored_tensors
from sftcli.modeling.load import load_model
from tests.support.architectures import build_architecture
from tests.support.tiny_families import WITH_BUFFERS, build_with_buffers, build_with_tower
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_tokenizer import build_tiny_tokenizer

CPU = torch.device("cpu")


def _load(folder: Path) -> PreTrainedModel:
    return load_model(folder, dtype=torch.float32, device=CPU)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _saved(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    save_model_folder(_load(source), source=source, folder=folder)
    return _tensors(folder)


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_fused_experts_and_buffers_have_their_places_and_come_back(tmp_path: Path, family: str) -> None:
    source = build_with_buffers(tmp_path / "source", family, dtype=torch.bfloat16)
    found = SourceTensors.of(_load(source), source)
    assert found.places.keys() == found.stored.keys()
    assert not found.beside
    assert found.is_plain == (family == "gemma4_text")
    assert _same(_saved(source, tmp_path / "out"), _tensors(source))


def test_a_sharded_source_gives_the_same_tensors(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source", tie=False)
    tensors = _tensors(source)
    _load(source).save_pretrained(source, max_shard_size="50KB")
    (source / "model.safetensors").unlink()
    assert len(list(source.glob("*.safetensors"))) > 2
    assert _same(_saved(source, tmp_path / "out"), tensors)


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_of_its_own_comes_back_whatever_the_configuration_says(
    tmp_path: Path, says_tied: bool
) -> None:
    source = build_tiny_model(tmp_path / "source", tie=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": says_tied}))
    assert _same(_saved(source, tmp_path / "out"), _tensors(source))


def test_a_tied_head_that_is_stored_twice_is_written_once_and_is_nothing_beside(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    tensors = _tensors(source)
    _write(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert not SourceTensors.of(_load(source), source).beside
    assert _same(_saved(source, tmp_path / "out"), tensors)


def test_what_older_files_hold_and_models_compute_is_no_tensor_beside(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    tensors = _tensors(source)
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _write(source, tensors | computed)
    assert not SourceTensors.of(_load(source), source).beside
    assert _same(_saved(source, tmp_path / "out"), tensors)


def test_a_gpt2_as_the_hub_has_it_has_its_places(tmp_path: Path) -> None:
    source = build_tiny_tokenizer(tmp_path / "source")
    model = build_architecture("gpt2")
    model.save_pretrained(source)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _tensors(source).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(2)}
    _write(source, tensors | masks)
    loaded = _load(source)
    assert isinstance(loaded, GPT2LMHeadModel)
    found = SourceTensors.of(loaded, source)
    assert found.places.keys() == tensors.keys()
    assert not found.beside
    assert _same(
        _saved(source, tmp_path / "out"), {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    )


def test_what_a_class_keeps_out_of_files_is_not_missed_in_them(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    model = _load(source)
    model._keys_to_ignore_on_save = ["model.norm.weight"]
    save_model_folder(model, source=source, folder=tmp_path / "out")
    assert _tensors(source).keys() - _tensors(tmp_path / "out").keys() == {"model.norm.weight"}


def test_each_tensor_keeps_the_type_that_it_has_in_the_source(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    tensors = _tensors(source)
    mixed = {
        name: tensor if "norm" in name else tensor.half() if "mlp" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    _write(source, mixed)
    assert _same(_saved(source, tmp_path / "out"), mixed)


def test_a_tower_lies_beside_and_its_language_model_comes_back_under_its_names(tmp_path: Path) -> None:
    source = build_with_tower(tmp_path / "source")
    model = _load(source)
    found = SourceTensors.of(model, source)
    words = found.in_words(found.without_text(model))
    assert words.startswith("23 tensors (21 model.visual.*, 2 mtp.*), ")
    check_names_come_back(model, source, found)
    assert _same(_saved(source, tmp_path / "out"), _tensors(source))
    again = SourceTensors.of(_load(tmp_path / "out"), tmp_path / "out")  # and may be trained again
    assert again.in_words(again.beside) == words


def test_layers_that_a_class_leaves_out_are_beside_it_under_the_names_of_the_file(tmp_path: Path) -> None:
    source = build_with_buffers(tmp_path / "source", "glm4_moe")
    tensors = _tensors(source)
    layer = {
        f"model.layers.46.mlp.experts.{number}.up_proj.weight": torch.rand(16, 32) for number in range(4)
    }
    layer["model.layers.46.eh_proj.weight"] = torch.rand(32, 64)
    _write(source, tensors | layer)
    found = SourceTensors.of(_load(source), source)
    assert found.beside.keys() == layer.keys()
    share = sum(tensor.numel() for tensor in layer.values()) / sum(
        tensor.numel() for tensor in (tensors | layer).values()
    )
    assert found.in_words(found.beside) == f"5 tensors (5 model.layers.46.*), {share:.1%} of all weights"
    assert _same(_saved(source, tmp_path / "out"), tensors | layer)


def test_tied_names_share_one_tensor_in_what_is_written(tmp_path: Path) -> None:
    model = _load(build_tiny_model(tmp_path / "source"))
    other = torch.rand_like(model.model.embed_tokens.weight)
    state = whole_state(model, {"model.embed_tokens.weight": other})
    assert state["lm_head.weight"] is other
    assert state["model.embed_tokens.weight"] is other


def test_copied_tensors_are_the_bytes_of_their_files_whatever_their_type(tmp_path: Path) -> None:
    held = {
        "a": torch.arange(7, dtype=torch.int64),
        "b": torch.rand(3, 5).to(torch.float8_e4m3fn),
        "c": torch.tensor(True),
        "d": torch.rand(0, 4),
        "e": torch.rand(4, 4).bfloat16(),
    }
    (tmp_path / "source").mkdir()
    _write(tmp_path / "source", held)
    stored = stored_tensors(tmp_path / "source")
    path = tmp_path / "copy.safetensors"
    path.write_bytes(b"".join(copied_file_parts(stored)))
    copied = load_file(path)
    assert copied.keys() == held.keys()
    for name, tensor in held.items():
        assert copied[name].dtype == tensor.dtype
        assert copied[name].shape == tensor.shape
        assert copied[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_groups_of_tensors_are_no_larger_than_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    _write(tmp_path / "source", {f"t{number}": torch.zeros(10) for number in range(7)})
    groups = list(in_parts(stored_tensors(tmp_path / "source"), 100))
    assert [len(group) for group in groups] == [2, 2, 2, 1]
    assert sorted(name for group in groups for name in group) == [f"t{number}" for number in range(7)]
    assert re.fullmatch(r"t\d", next(iter(groups[0])))
