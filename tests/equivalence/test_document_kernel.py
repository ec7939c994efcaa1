"""Packed rows through torch's kernel for documents, which runs on CUDA alone: what it is handed, by a stand-in on the CPU."""

import pytest
import torch
from torch.nn import functional

from sftcli.data.batches.batch import collate, collate_packed
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights.masters import MasterWeights
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.training import PAD_ID, random_examples

TOLD_OF_DOCUMENTS = [name for name in ARCHITECTURES if name != "modern"]  # which attends in its own way


class Kernel:
    """``varlen_attn`` as torch documents it, document by document; refuses what that refuses."""

    def __init__(self):
        self.calls = 0

    def __call__(
        self, query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size, enable_gqa
    ):
        self.calls += 1
        assert query.ndim == key.ndim == value.ndim == 3
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert all(part.stride(-1) == 1 and part.shape[-1] % 8 == 0 for part in (query, key, value))
        assert bounds.dtype == key_bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        lengths = bounds.diff().tolist()
        assert type(longest) is type(longest_key) is int
        assert longest == longest_key >= max(lengths)
        assert (int(bounds[0]), sum(lengths)) == (0, len(query))
        assert enable_gqa or query.shape[1] == key.shape[1]
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._document(*part, scale, window_size) for part in parts]).to(query.dtype)

    @staticmethod
    def _document(query, key, value, scale, window_size):
        left, right = window_size
        place = torch.arange(len(query))
        back = place[:, None] - place[None]
        seen = (back >= -right) & ((back <= left) | (left < 0))
        query, key, value = (part.transpose(0, 1)[None].float() for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


def loss_and_gradient(model, batches):
    weights = MasterWeights(model, compute_dtype=torch.bfloat16)
    model.train()
    total = 0.0
    for batch in batches:
        nll = response_nll_sum(model, batch)
        nll.backward()
        total += nll.item()
    gradients = [master.grad.flatten() for master in weights.masters.values() if master.grad is not None]
    return total, torch.cat(gradients)


@pytest.mark.parametrize("name", TOLD_OF_DOCUMENTS)
def test_packed_rows_through_the_kernel_give_the_loss_and_gradients_of_rows_alone(monkeypatch, name: str):
    rows = random_examples(5, longest=40)
    alone = [collate([row], example_ids=[index], pad_id=PAD_ID) for index, row in enumerate(rows)]
    loss, gradient = loss_and_gradient(build_architecture(name), alone)
    kernel, model = Kernel(), build_architecture(name)
    monkeypatch.setattr("sftcli.modeling.kernels.document_attention._varlen", lambda query, value: kernel)
    assert attend_by_document(model)

    packed = collate_packed([rows], example_ids=range(len(rows)), pad_id=PAD_ID)
    found_loss, found_gradient = loss_and_gradient(model, [packed])

    assert kernel.calls == model.config.num_hidden_layers
    assert found_loss == pytest.approx(loss, rel=5e-3)
    assert (found_gradient - gradient).norm() < 0.05 * gradient.norm()
