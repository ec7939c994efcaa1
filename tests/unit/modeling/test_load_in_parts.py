"""A model whose weights stay in its files computes what the model in memory computes, and is refused as that is."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftcli.errors import DataError, MismatchError, NotFoundError, SftError
from sftcli.modeling.formats.file_weights import FileWeights, WholeOnlyError
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.load import load_in_parts, load_model
from sftcli.runtime import share_of
from sftcli.training.distributed.group import Group
from sftcli.training.weights.sharded import layers_of
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.tiny_experts import FAMILIES, build_experts
from tests.support.tiny_model import build_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)[None]


def _in_parts(folder: Path, dtype: torch.dtype = torch.float32):
    return load_in_parts(folder, dtype=dtype, together=Group())


def _whole(folder: Path, dtype: torch.dtype = torch.float32):
    return load_model(folder, dtype=dtype, device=CPU)


def _numbers(files: FileWeights) -> int:
    """Return how many numbers are in memory."""
    return sum(one.numel() for one in files.tensors if any(one.stride()))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_gives_what_the_model_in_memory_gives_bit_for_bit(tmp_path, architecture, stored):
    build_architecture(architecture).to(stored).save_pretrained(tmp_path)
    model, files = _in_parts(tmp_path)
    expected = _whole(tmp_path)
    assert [*dict(model.named_parameters())] == [*dict(expected.named_parameters())]
    for (name, buffer), (other, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, wanted)
    with files.streamed(model, layers_of(model)):
        logits = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(logits, expected(input_ids=IDS, use_cache=False).logits)
    assert _numbers(files) == 0
    assert bool(model(input_ids=IDS, use_cache=False).logits.isnan().all())


def test_one_layer_at_a_time_is_in_memory_and_what_is_in_no_layer(tmp_path):
    model, files = _in_parts(build_tiny_model(tmp_path, dtype=torch.bfloat16))
    layers = layers_of(model)
    one = sum(weight.numel() for weight in layers[0].parameters())
    outside = sum(weight.numel() for weight in model.parameters()) - len(layers) * one
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append(_numbers(files)))
    with files.streamed(model, layers) as hold:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss  # its graph keeps none of them
        assert seen == [outside + one] * len(layers)
        kept = [part.untyped_storage().nbytes() for part in _saved(loss.grad_fn)]
        assert 4 * one not in kept
        hold(layers[0])
        assert _numbers(files) == outside + one
        with pytest.raises(ZeroDivisionError), files.streamed(model, layers):
            raise ZeroDivisionError
    assert _numbers(files) == 0


def test_layers_in_their_faster_form_are_tried_with_their_weights(tmp_path):
    model, files = _in_parts(build_tiny_model(tmp_path))
    with files.streamed(model, layers_of(model)) as hold:
        found = fuse_layers(model, hold=hold)
    assert found == fuse_layers(_whole(tmp_path))
    assert "LlamaDecoderLayer" in found.fused


def test_weights_of_an_adapters_base_have_its_type(tmp_path):
    model, files = _in_parts(build_tiny_model(tmp_path), torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    expected = dict(_whole(tmp_path, torch.bfloat16).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(files.tensors[weight].whole(), expected[name])


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder, lambda tensors: tensors.pop(name))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def _config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _spoil(value: float) -> Callable[[Path], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    return lambda folder: _rewrite(folder, spoil)


@pytest.mark.parametrize(
    ("damage", "kind", "named"),
    [
        (
            _drop("model.layers.1.mlp.up_proj.weight"),
            MismatchError,
            r"lack tensors .*layers\.1\.mlp\.up_proj",
        ),
        (_drop("model.norm.weight"), MismatchError, r"lack tensors .*model\.norm"),
        (_config(num_hidden_layers=1), MismatchError, r"does not define: model\.layers\.1"),
        (_config(intermediate_size=32), MismatchError, r"is \(64, 32\) instead of \(32, 32\)"),
        (_cut, DataError, "bytes long"),
        (_spoil(math.nan), DataError, r"non-finite values in float32: model\.layers\.1\.mlp\.up_proj"),
        (_spoil(math.inf), DataError, r"non-finite values in float32: model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_a_damaged_folder_is_refused_in_the_words_of_whole_loading(tmp_path, damage, kind, named):
    damage(build_tiny_model(tmp_path))
    with pytest.raises(kind, match=named) as found:
        _in_parts(tmp_path)
    with pytest.raises(SftError) as wanted:
        _whole(tmp_path)
    assert (found.value.message, found.value.hint) == (wanted.value.message, wanted.value.hint)


def test_a_file_that_is_cut_off_or_gone_by_the_time_it_is_read_is_named(tmp_path):
    model, files = _in_parts(build_tiny_model(tmp_path))
    path = tmp_path / "model.safetensors"
    tensor = files.tensors[model.lm_head.weight]
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        tensor.whole()
    path.unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors does not exist"):
        [*tensor.pieces(0, 9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_put_together_as_in_the_model_in_memory(tmp_path, family):
    build_experts(family).to(torch.bfloat16).save_pretrained(tmp_path)
    model, files = _in_parts(tmp_path)
    expected = _whole(tmp_path)
    wanted = dict(expected.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(files.tensors[weight].whole(), wanted[name]), name
        rows = [piece for _, piece in files.tensors[weight].pieces(1, len(weight))]
        assert not rows or torch.equal(torch.cat(rows), wanted[name][1:]), name
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with files.streamed(model, layers_of(model)):
        logits = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(logits, expected(input_ids=IDS, use_cache=False).logits)


def test_a_head_that_is_stored_beside_the_embeddings_it_is_tied_to_is_loaded_whole(tmp_path):
    def store_twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _rewrite(build_tiny_model(tmp_path), store_twice)
    with pytest.raises(WholeOnlyError, match="under several names"):
        _in_parts(tmp_path)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_given_out_as_torch_chunks_them(length, size):
    chunks = torch.arange(length).chunk(size)
    shares = [share_of(length, rank, size) for rank in range(size)]
    assert [torch.arange(length)[begin:end].tolist() for begin, end in shares] == [
        *(chunk.tolist() for chunk in chunks),
        *[[]] * (size - len(chunks)),
    ]


def _saved(node) -> list[torch.Tensor]:
    """Return all tensors that a graph of losses has saved."""
    found, left, seen = [], [node], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [one for one, _ in node.next_functions]
        names = [name for name in dir(node) if name.startswith("_raw_saved_")]
        names = [name.removeprefix("_raw") for name in names]
        values = [getattr(node, name) for name in names]
        found += [value for value in values if isinstance(value, torch.Tensor)]
    return found
