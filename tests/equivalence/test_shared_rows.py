"""Processes that share rows: losses and gradients are those of one process that computes all positions."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sftcli.data.batches.batch import Batch, collate, collate_packed
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.errors import UsageError
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.kernels.document_attention import attend_by_document, attend_together
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.training.distributed.group import Group
from sftcli.training.loss import response_nll_sum
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.shared_rows import share_rows
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.weights.placement import full_tensor
from sftcli.training.weights.sharded import ShardedWeights
from tests.models.families import enliven, family_config
from tests.support.processes import run_together
from tests.support.training import CPU, PAD_ID

TOLERANCE = 1e-5
ROW_TOKENS = 4096
DOCUMENTS = (1500, 37, 1, 2000, 558)  # their sum is a row
SMALL: dict[str, int | float] = {
    "vocab_size": 514, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
    "max_position_embeddings": ROW_TOKENS,
}  # fmt: skip
WINDOW = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},  # norms of queries and keys
    "gemma3_text": WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mistral": {"sliding_window": 700},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 12, "n_positions": ROW_TOKENS, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
             "resid_pdrop": 0.0},  # learned positions
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 12,
    },  # heads of keys and values that differ in size
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def example(tokens: int, line: int) -> Example:
    generator = np.random.default_rng(line)
    mask = generator.random(tokens) < 0.5
    mask[-1] = True
    ids = generator.integers(3, 500, size=tokens).astype(np.int32)
    return Example(input_ids=ids, loss_mask=mask, origin=Origin(path="random", line=line))


def window_of_step() -> list[Batch]:
    """A full packed row, padded rows of another width, whose last part has no token of the short ones, and a short packed row."""
    full = [example(tokens, line) for line, tokens in enumerate(DOCUMENTS)]
    padded = [example(tokens, 10 + line) for line, tokens in enumerate((301, 17, 250))]
    short = [example(tokens, 20 + line) for line, tokens in enumerate((29, 50))]
    return [
        collate_packed([full], example_ids=range(5), pad_id=PAD_ID),
        collate(padded, example_ids=range(3), pad_id=PAD_ID),
        collate_packed([short], example_ids=range(2), pad_id=PAD_ID),
    ]


def loss_and_gradients(
    group: Group, family: str, window: Sequence[Batch], *, parallel: str = "ddp", **changes: bool
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a response token of ``window``, and the gradients of it."""
    model = build(family)
    if changes.get("fused"):
        fuse_layers(model)
    if changes.get("checkpointing"):
        checkpoint_activations(model)
    weights = (
        ShardedWeights(
            model,
            compute_dtype=torch.float32,
            group=group,
            shards=2 if parallel == "hsdp" else group.size,
            device=CPU,
        )
        if parallel != "ddp" and group.size > 1
        else MasterWeights(model, compute_dtype=torch.float32)
    )
    assert attend_by_document(model)
    attend_together(model, group)
    batch_loss = weights.gathered(lambda batch: response_nll_sum(model, batch))
    tokens, total = sum(batch.response_tokens for batch in window), torch.zeros(3)
    for batch, weight in weights.micro_batches(window, group):
        loss = batch_loss(batch) * weight / tokens
        loss.backward()
        total[0] += loss.detach()
    total = weights.gather(total, group)
    gradients = {name: full_tensor(master.grad) for name, master in weights.masters.items()}
    return float(total[0]), gradients


def shared_is_whole(group: Group, parts: int, family: str, parallel: str, changes: dict[str, bool]) -> None:
    window = window_of_step()
    expected, wanted = loss_and_gradients(Group(), family, window, **changes)
    group.share_rows(parts)
    found, gradients = loss_and_gradients(group, family, window, parallel=parallel, **changes)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=TOLERANCE, msg=name)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("size", "parts"), [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_shared_rows_are_those_of_whole_ones(
    tmp_path: Path, family: str, size: int, parts: int, parallel: str
) -> None:
    run_together(shared_is_whole, size=size, folder=tmp_path, args=(parts, family, parallel, {}))


def swaps_what_is_predicted(group: Group) -> None:
    group.share_rows(2)
    window = window_of_step()
    loss_and_gradients(group, "llama", window)
    weights = 4 * sum(parameter.numel() for parameter in build("llama").parameters())
    positions = sum(batch.part(0, 2).input_ids.numel() for batch in window)
    heads = 2 * int(SMALL["num_attention_heads"]) + 2 * int(SMALL["num_key_value_heads"])
    # Queries, keys, values and results of two layers in float32, and the gradients of all of these.
    swapped = 2 * 2 * 4 * positions * heads * int(SMALL["head_dim"])
    assert group.exchanged_bytes == weights + swapped


@pytest.mark.slow
def test_exchanged_bytes_are_the_predicted_ones(tmp_path: Path) -> None:
    run_together(swaps_what_is_predicted, size=2, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_groups_with_a_replica_each_share_rows(tmp_path: Path, parts: int) -> None:
    run_together(shared_is_whole, size=4, folder=tmp_path, args=(parts, "qwen3", "hsdp", {}))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["fused", "checkpointing"])
def test_rows_are_shared_beside_other_ways_to_compute(tmp_path: Path, way: str, parallel: str) -> None:
    run_together(shared_is_whole, size=2, folder=tmp_path, args=(2, "llama", parallel, {way: True}))


def _swapped(group: Group) -> None:
    group.share_rows(2)
    pieces = torch.tensor([[10.0 * group.rank], [10.0 * group.rank + 1]])
    first = group.rank - group.part
    assert group.swap(pieces)[:, 0].tolist() == [10.0 * (first + other) + group.part for other in range(2)]
    assert group.exchanged_bytes == 8


@pytest.mark.slow
def test_neighbors_swap_what_they_have_of_each_other(tmp_path: Path) -> None:
    run_together(_swapped, size=4, folder=tmp_path)


REFUSED = {
    "mamba": (2, "layers with a state or a convolution mix positions"),
    "lfm2": (2, "layers with a state or a convolution mix positions"),
    "qwen3_next": (2, "layers with a state or a convolution mix positions"),
    "rwkv": (2, "its attention is its own"),
    "gemma2": (2, "its attention is its own (eager)"),
    "bloom": (2, "its attention is its own (eager)"),
    "llama4_text": (2, "gets other losses than in a whole row"),  # its chunks are told by a mask
    "llama": (3, "attention of this model has 4 heads, which 3 processes cannot share evenly"),
}


def refuses(group: Group, family: str, words: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32)
        enliven(model)
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        shared(group, model)
    assert "training.context_processes" in f"{refused.value.hint}"


def shared(group: Group, model: PreTrainedModel) -> None:
    group.share_rows(group.size)
    share_rows(
        model,
        [example(90, 0), example(50, 1)],
        group=group,
        batch_loss=lambda batch: response_nll_sum(model, batch),
        sharing=RowSharing.NONE,
        pad_id=PAD_ID,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_models_whose_rows_cannot_be_shared_are_refused_by_name(tmp_path: Path, family: str) -> None:
    size, words = REFUSED[family]
    run_together(refuses, size=size, folder=tmp_path, args=(family, words))


def refuses_shifted_tokens(group: Group) -> None:
    model = build("llama")
    shared(group, model)

    def shift(_: torch.nn.Module, __: object, hidden: Tensor) -> Tensor:
        return hidden + 0.01 * functional.pad(hidden, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(UsageError, match="a part of the positions gets other losses than in a whole row"):
        shared(group, model)
    with pytest.raises(UsageError, match="kept apart by a mask"):
        share_rows(
            build("llama"),
            [example(9, 0)],
            group=group,
            batch_loss=lambda _: torch.zeros(()),
            sharing=RowSharing.MASK,
            pad_id=PAD_ID,
        )


@pytest.mark.slow
def test_layers_that_look_at_other_positions_are_found_by_the_losses(tmp_path: Path) -> None:
    run_together(refuses_shifted_tokens, size=2, folder=tmp_path)
