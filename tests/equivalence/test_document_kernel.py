"""Packed rows through torch's kernel for documents, which runs on CUDA alone: what it is handed, by a stand-in on the CPU."""

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from sftcli.data.batches.batch import collate, collate_packed
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.kernels.document_attention import attend_by_document, computed_by
from sftcli.modeling.kernels.varlen import Varlen, signature_of
from sftcli.runtime import body_of
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights.masters import MasterWeights
from tests.support.architectures import SMALL, build_architecture
from tests.support.training import PAD_ID, random_examples
from tests.support.varlen import Calls, kernel_of

ROWS = random_examples(5, longest=40)
MIXED = {"sliding_window": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
OWN = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **MIXED)),
}
WINDOWED = {"mistral": 2, "gemma3": 1}  # layers with a window, of two
KERNEL = "sftcli.modeling.kernels.document_attention.varlen_on"


def build(name):
    if name not in OWN:
        return build_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OWN[name]()


def packed():
    return collate_packed([ROWS], example_ids=range(len(ROWS)), pad_id=PAD_ID)


def loss_and_gradient(model, batches, dtype):
    weights = MasterWeights(model, compute_dtype=dtype)
    model.train()
    total = 0.0
    for batch in batches:
        nll = response_nll_sum(model, batch)
        nll.backward()
        total += nll.item()
    gradients = [master.grad.flatten() for master in weights.masters.values() if master.grad is not None]
    return total, torch.cat(gradients)


def alone(name, dtype):
    rows = [collate([row], example_ids=[index], pad_id=PAD_ID) for index, row in enumerate(ROWS)]
    return loss_and_gradient(build(name), rows, dtype)


@pytest.mark.parametrize("release", ["2.10", "2.11", "2.12"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_packed_rows_through_the_kernel_give_the_loss_and_gradients_of_rows_alone(monkeypatch, name, release):
    loss, gradient = alone(name, torch.float32)
    calls, model = Calls(), build(name)
    kernel = kernel_of(release, calls)
    monkeypatch.setattr(KERNEL, lambda device: kernel)
    assert attend_by_document(model)

    found_loss, found_gradient = loss_and_gradient(model, [packed()], torch.float32)

    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert (found_gradient - gradient).norm() < 1e-4 * gradient.norm()
    has_all = release != "2.10" or name not in WINDOWED
    windows = sorted(calls.windows)
    if has_all:
        windowed = WINDOWED.get(name, 0)
        assert windows == [(-1, 0)] * (2 - windowed) + [(7, 0)] * windowed
        assert computed_by(model) == "varlen"
    else:  # its windows, and the scale of Gemma 3, are nothing that it can be told
        assert windows == []
        assert computed_by(model) == "by document"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_in_bfloat16_the_kernel_is_as_near_as_rounding_lets_it(monkeypatch, name):
    loss, gradient = alone(name, torch.bfloat16)
    calls, model = Calls(), build(name)
    monkeypatch.setattr(KERNEL, lambda device: kernel_of("2.12", calls, dtypes={torch.bfloat16}))
    assert attend_by_document(model)
    found_loss, found_gradient = loss_and_gradient(model, [packed()], torch.bfloat16)
    assert len(calls.windows) == 2
    assert found_loss == pytest.approx(loss, rel=5e-3)
    assert (found_gradient - gradient).norm() < 0.05 * gradient.norm()


def on_meta(name, dtype):
    """Return a model without numbers: what asks its tensors for one, as a wait for a device does, raises."""
    model = build(name).to(dtype).to("meta").train()
    assert attend_by_document(model)
    return model, packed().to(torch.device("meta"))


def real(device):
    release = torch.__version__.partition("+")[0]
    return Varlen(
        function=varlen_attn, signature=signature_of(varlen_attn), capability=(9, 0), release=release
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("kernel", "dtype", "by"),
    [
        (real, torch.bfloat16, "varlen"),
        (real, torch.float32, "by document"),
        (lambda device: None, torch.float32, "by document"),
    ],
)
def test_no_layer_waits_for_the_device(monkeypatch, kernel, dtype, by, name, checkpointed):
    if by == "varlen" and kernel("meta").signature.since == "2.10" and name in WINDOWED:
        pytest.skip("torch 2.10 has no windows")
    monkeypatch.setattr(KERNEL, kernel)
    model, batch = on_meta(name, dtype)
    if checkpointed:
        checkpoint_activations(model)
    # Where masks are made, once in a pass, transformers looks for documents in positions.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    hidden = body_of(model)(**batch.inputs, use_cache=False).last_hidden_state
    hidden.sum().backward()
    assert computed_by(model) == by
    assert all(weight.grad is not None for weight in model.model.layers.parameters())


def test_a_wait_for_the_device_would_be_seen_there(monkeypatch):
    model, batch = on_meta("llama", torch.float32)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    told = {name: value for name, value in batch.inputs.items() if name != "document_lengths"}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        body_of(model)(**told, use_cache=False)


def test_documents_that_are_told_by_their_bounds_alone_are_right_too(monkeypatch):
    model, batch = build("llama"), packed()
    assert attend_by_document(model)
    told = batch.inputs
    expected = model(**told, use_cache=False).logits
    without = {name: value for name, value in told.items() if name != "document_lengths"}
    assert torch.equal(model(**without, use_cache=False).logits, expected)
