"""Layers with a state are told where documents begin, in the words that their kernels know; what does not listen is found out."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.qwen3_next import modeling_qwen3_next

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import collate, collate_packed
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.state_kernels import missing_kernels
from sftcli.training.loss import response_nll_sum
from sftcli.training.probes.packing import choose_packing
from tests.support.architectures import SMALL, build_architecture
from tests.support.recording import RecordingSink
from tests.support.training import PAD_ID, random_examples

EXAMPLES = random_examples(8)
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_expand": 2,
}  # fmt: skip
HYBRIDS = {
    "qwen3_next": {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": _MAMBA | {"head_dim": 8, "mamba_d_ssm": 64},
    "granitemoehybrid": _MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
}  # fmt: skip
CODE = {
    "qwen3_next": modeling_qwen3_next, "lfm2": modeling_lfm2, "falcon_h1": modeling_falcon_h1,
    "granitemoehybrid": modeling_granitemoehybrid,
}  # fmt: skip


def build(family: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **HYBRIDS[family]))


def lengths_of(numbers):
    return numbers[0].unique_consecutive(return_counts=True)[1].tolist()


def conv_that_listens(plain):
    def run(x, weight, bias=None, activation=None, seq_idx=None, **rest):
        if seq_idx is None:
            return plain(x, weight, bias, activation)
        return torch.cat(
            [plain(part, weight, bias, activation) for part in x.split(lengths_of(seq_idx), -1)], -1
        )

    return run


def scan_that_listens(plain):
    def run(x, dt, decay, before, after, *, seq_idx=None, z=None, **rest):
        rest = {
            name: value
            for name, value in rest.items()
            if not name.startswith(("cu_seq", "max_len", "position"))
        }
        if seq_idx is None:
            return plain(x, dt, decay, before, after, **rest)
        parts = zip(*(each.split(lengths_of(seq_idx), 1) for each in (x, dt, before, after)), strict=True)
        return torch.cat([plain(x, dt, decay, one, two, **rest) for x, dt, one, two in parts], 1)

    return run


def delta_that_listens(plain):
    def run(query, key, value, *, g, beta, cu_seqlens=None, use_qk_l2norm_in_kernel=False, **rest):
        sizes = [query.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        parts = zip(*(each.split(sizes, 1) for each in (query, key, value, g, beta)), strict=True)
        made = [
            plain(q, k, v, g=decay, beta=b, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0]
            for q, k, v, decay, b in parts
        ]
        return torch.cat(made, 1), None

    return run


def deaf(plain):
    """A kernel that takes what it is told and does nothing with it."""
    names = ("seq_idx", "cu_seqlens")
    return lambda *args, **rest: plain(*args, **{name: v for name, v in rest.items() if name not in names})


LISTENING = {
    "causal_conv1d_fn": conv_that_listens,
    "mamba2_chunk_scan": scan_that_listens,
    "torch_chunk_gated_delta_rule": delta_that_listens,
}


def install(monkeypatch, family: str, *, but: str = ""):
    """Put kernels in the place of the plain forms of ``family``, all of which listen ``but`` one."""
    code = CODE[family]
    for name, make in LISTENING.items():
        if hasattr(code, name):
            plain = getattr(code, name)
            monkeypatch.setattr(code, name, deaf(plain) if name == but else make(plain))
    if hasattr(code, "mamba2_split_conv1d_scan_combined"):
        monkeypatch.setattr(code, "mamba2_split_conv1d_scan_combined", lambda *args, **rest: None)


def packs(model) -> bool:
    chosen = choose_packing(
        model, EXAMPLES, longest=max(EXAMPLES.num_tokens), settings=TrainingSettings(), pad_id=PAD_ID,
        emit=RecordingSink(),
    )  # fmt: skip
    return chosen.packing is not None


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_plain_forms_are_not_packed(family):
    assert not packs(build(family))


@pytest.mark.parametrize("family", HYBRIDS)
def test_kernels_that_listen_are_packed_with_the_loss_and_gradients_of_rows_alone(monkeypatch, family):
    install(monkeypatch, family)
    model = build(family).train()

    def found(batches):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            nll = response_nll_sum(model, batch)
            nll.backward()
            total += nll.item()
        return total, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    expected, wanted = found([collate([one], example_ids=[0], pad_id=PAD_ID) for one in EXAMPLES])
    assert packs(model)
    loss, gradients = found([collate_packed([EXAMPLES], example_ids=range(8), pad_id=PAD_ID)])
    assert loss == pytest.approx(expected, rel=1e-5)
    for left, right in zip(gradients, wanted, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-6


DEAF = [(family, name) for family in HYBRIDS for name in LISTENING if hasattr(CODE[family], name)]


@pytest.mark.parametrize(("family", "name"), DEAF)
def test_one_kernel_that_does_not_listen_keeps_rows_apart(monkeypatch, family, name):
    install(monkeypatch, family, but=name)
    assert not packs(build(family))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_next", ("flash-linear-attention", "causal-conv1d")),
        ("lfm2", ("causal-conv1d",)),
        ("falcon_h1", ("causal-conv1d", "mamba-ssm")),
        ("granitemoehybrid", ("causal-conv1d", "mamba-ssm")),
    ],
)
def test_what_is_missing_for_the_kernels_of_a_family_is_named(family, names):
    assert missing_kernels(build(family)) == names


def test_nothing_is_missing_without_a_state():
    assert missing_kernels(build_architecture("llama")) == ()
    attention_only = HYBRIDS["granitemoehybrid"] | {"layer_types": ["attention"] * 2}
    config = AutoConfig.for_model("granitemoehybrid", **SMALL, **attention_only)
    assert missing_kernels(AutoModelForCausalLM.from_config(config)) == ()


def test_other_models_are_told_nothing_of_it():
    model, seen = build_architecture("llama"), []
    assert attend_by_document(model)
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    response_nll_sum(model, collate_packed([EXAMPLES], example_ids=range(8), pad_id=PAD_ID))
    assert "seq_idx" not in seen[0]
    assert "cu_seq_lens_q" in seen[0]
