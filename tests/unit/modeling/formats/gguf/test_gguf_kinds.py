"""Forms of a GGUF file's matrices: what rounding does, which tensors stay higher, and files that are refused for their logits."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from sftcli.events import NeverStop, Session, unheard
from sftcli.modeling.formats.gguf.gguf_compare import compare_file
from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, write_gguf
from sftcli.modeling.formats.gguf.gguf_kinds import FILE_TYPES, NOISES, block_of, is_rounded, types_of
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.gguf_families import build_gguf_family

KINDS = list(FILE_TYPES)
QUANTIZED = [kind for kind in KINDS if kind.startswith("q")]
IDS = torch.arange(5, 5 + 96).reshape(4, 24)


def rounded(numbers: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(gguf.quantize(numbers, FILE_TYPES[kind][0]), FILE_TYPES[kind][0])


def write(folder: Path, kind: str, *, family: str = "llama", edit=None) -> tuple[Path, PreTrainedModel]:
    model = build_gguf_family(family, folder / "model")
    if edit is not None:
        edit(model)
    path = folder / f"{kind}.gguf"
    write_gguf(
        path, model, load_chat_tokenizer(folder / "model"), source=folder / "model", kind=kind,
        facts=ModelFacts(name="walnut"), session=Session(emit=unheard, stop=NeverStop()),
    )  # fmt: skip
    return path, model


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_the_table_is_that_of_random_numbers(kind: str) -> None:
    numbers = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    noise = np.sqrt(np.mean((rounded(numbers, kind) - numbers) ** 2))
    assert noise == pytest.approx(NOISES[FILE_TYPES[kind][0]], rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(-9, 4),
    tail=st.floats(0.1, 4),
    shift=st.floats(-2, 2),
)
def test_numbers_that_were_rounded_are_within_the_bound_and_others_are_not(
    kind: str, seed: int, size: float, tail: float, shift: float
) -> None:
    chance = np.random.default_rng(seed)
    numbers = chance.standard_normal((2, 64))
    numbers = np.sign(numbers) * np.abs(numbers) ** tail + shift
    numbers = (numbers * 10**size / np.abs(numbers).max()).astype(np.float32)
    found, of = rounded(numbers, kind), FILE_TYPES[kind][0]
    assert is_rounded(numbers, found, of)
    moved = found.copy()
    moved[1, 7] += 0.3 * np.abs(numbers).max() + 1e-4
    assert not is_rounded(numbers, moved, of)


def test_blocks_of_numbers_too_small_for_a_scale_are_zero_and_no_fault() -> None:
    numbers = np.full((1, 32), 1e-7, dtype=np.float32)
    assert is_rounded(numbers, rounded(numbers, "q8_0"), gguf.GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_tensors_that_stay_higher(kind: str) -> None:
    shapes = {
        "token_embd.weight": (520, 32), "output_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32), "blk.0.ffn_gate_inp.weight": (8, 32), "blk.0.ffn_down_exps.weight": (8, 32, 64),
        "blk.0.ffn_up.weight": (64, 40),
    }  # fmt: skip
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    of = {name: found.name.lower() for name, found in types_of(tensors, kind).items()}
    assert of["output_norm.weight"] == of["blk.0.ffn_gate_inp.weight"] == "f32"
    assert (
        of["token_embd.weight"] == of["blk.0.attn_k.weight"] == "q8_0"
    )  # the head too; beside eight experts
    assert of["blk.0.attn_q.weight"] == of["blk.0.ffn_down_exps.weight"] == kind
    assert of["blk.0.ffn_up.weight"] == "f16"  # rows of 40 are no blocks
    untied = types_of(tensors | {"output.weight": torch.empty(520, 32)}, kind)
    assert untied["output.weight"].name == "Q8_0"
    assert untied["token_embd.weight"].name.lower() == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_is_near_its_model_and_no_bound_is_idle(kind: str, tmp_path: Path) -> None:
    path, model = write(tmp_path, kind)
    found = compare_file(path, model, IDS)
    assert found.is_near, found
    assert kind == "f32" or found.distance > found.limit / 10
    assert kind != "f32" or found.distance == 0
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_up.weight"] == kind
    assert kinds["blk.1.attn_norm.weight"] == "f32"


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "phi3", "olmo2"])
def test_numbers_come_back_under_the_names_that_the_model_has(family: str, tmp_path: Path) -> None:
    path, model = write(tmp_path, "f32", family=family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = compare_file(path, model, IDS)
    assert found.distance < 1e-6  # the gains of Gemma are stored with one added
    assert found.same == found.places == IDS.numel()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def coarsen(model: PreTrainedModel) -> None:
    """Give a number of each block a size beside which the others vanish, without changing what the model computes."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[::32] /= 1000
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight[:, ::32] *= 1000


def test_a_model_that_blocks_of_four_bits_break_is_told_from_one_that_they_do_not(tmp_path: Path) -> None:
    path, model = write(tmp_path, "q4_0", edit=coarsen)
    assert not compare_file(path, model, IDS).is_near
    path, model = write(tmp_path / "wide", "bf16", edit=coarsen)
    assert compare_file(path, model, IDS).is_near


def test_the_file_of_another_model_is_far_away(tmp_path: Path) -> None:
    path, model = write(tmp_path, "f16")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.copy_(
            model.model.layers[0].self_attn.k_proj.weight.flip(0)
        )
    assert not compare_file(path, model, IDS).is_near


def test_every_kind_has_blocks_that_the_package_writes() -> None:
    assert {block_of(FILE_TYPES[kind][0]) for kind in QUANTIZED} == {32}
