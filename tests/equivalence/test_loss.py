"""The loss is what it says: transformers' own, however it is cut into batches and chunks."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.config.schema.training import Loss
from sftcli.data.batches.batch import IGNORED, batches_in_order_of_length, collate, collate_packed
from sftcli.events import NeverStop, Warned
from sftcli.modeling.adapter.adapter import add_adapter
from sftcli.training import loss as loss_module
from sftcli.training.loss import (
    HeadNllSum,
    LogitTransform,
    heldout_nll,
    minimized,
    nll_of,
    plain_nll_sum,
    response_nll_sum,
)
from sftcli.training.probes.loss import choose_batch_loss
from tests.support.recording import RecordingSink
from tests.support.training import PAD_ID, random_examples, tiny_llama


def a_batch(count: int = 6):
    examples = random_examples(count)
    return collate(examples, example_ids=range(count), pad_id=PAD_ID)


@pytest.mark.parametrize("tie", [True, False])
def test_loss_of_a_batch_equals_transformers_own(tie: bool):
    model, batch = tiny_llama(tie=tie), a_batch()
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    own = model(input_ids=batch.input_ids, labels=labels).loss
    ours = response_nll_sum(model, batch) / batch.response_tokens
    assert ours.item() == pytest.approx(own.item(), abs=1e-4)


def by_mask(model, batch, loss=Loss.NLL):
    """The loss as it is where positions are found by a mask, which a device has to search."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    wanted = batch.targets != IGNORED
    parts = hidden[wanted], model.lm_head.weight, None, batch.targets[wanted]
    return HeadNllSum.apply(*parts, LogitTransform(), loss)


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("packed", [False, True])
def test_positions_that_are_told_give_the_loss_and_gradients_of_a_mask_bit_for_bit(loss: Loss, packed: bool):
    examples, ends = random_examples(6), []
    packs = [examples] if packed else [[example] for example in examples]
    batch = collate_packed(packs, example_ids=range(6), pad_id=PAD_ID)
    if not packed:
        batch = replace(batch, documents=None)
    for compute in (by_mask, response_nll_sum):
        model = tiny_llama()
        sums = compute(model, batch, loss)
        minimized(sums).backward()
        ends.append((sums, [weight.grad for weight in model.parameters()]))
    (expected, theirs), (found, ours) = ends
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_padding_changes_no_loss():
    model, examples = tiny_llama(), random_examples(6)
    together = response_nll_sum(model, collate(examples, example_ids=range(6), pad_id=PAD_ID))
    apart = sum(
        response_nll_sum(model, collate([example], example_ids=[0], pad_id=PAD_ID)) for example in examples
    )
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


@pytest.mark.parametrize("max_chunk_logits", [514, 514 * 3, 2**25])
def test_chunked_loss_and_gradients_equal_plain_ones(monkeypatch: pytest.MonkeyPatch, max_chunk_logits: int):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", max_chunk_logits)
    batch = a_batch()
    lean, plain = tiny_llama(), tiny_llama()
    ours, theirs = response_nll_sum(lean, batch), plain_nll_sum(plain, batch)
    (ours / batch.response_tokens).backward()
    (theirs / batch.response_tokens).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for (name, left), (_, right) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture
def _sums_inside_products(monkeypatch):
    """Let products on the CPU add bfloat16 to float32, as those on CUDA can, and be asked to."""

    def product(left, right, dtype, *, out):
        return out.copy_(left.float() @ right.float())

    def sum_of(total, left, right, dtype, *, beta=1, alpha=1, out):
        return out.copy_(total + left.float() @ right.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", product, "CPU")
    library.impl("addmm.dtype_out", sum_of, "CPU")
    monkeypatch.setattr(loss_module, "_SUMS_IN_PRODUCT", frozenset({"cpu"}))
    yield
    library._destroy()


def gradient_of_head(dtype):
    """Return that of a head of 50 tokens whose 12 positions make three chunks."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, 16, generator=generator).to(torch.bfloat16).to(dtype) for size in (12, 50)
    )
    weight.requires_grad_()
    targets = torch.arange(12) % 50
    HeadNllSum.apply(hidden, weight, None, targets, LogitTransform()).backward()
    return weight.grad


def test_sums_inside_products_are_those_beside_them(monkeypatch, request):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 50 * 4)
    exact, beside = gradient_of_head(torch.float32), gradient_of_head(torch.bfloat16)
    request.getfixturevalue("_sums_inside_products")
    torch.testing.assert_close(gradient_of_head(torch.float32), exact)
    inside = gradient_of_head(torch.bfloat16)
    errors = [(found.float() - exact).norm() / exact.norm() for found in (inside, beside)]
    assert errors[0] <= 1.05 * errors[1] < 0.02


@pytest.mark.usefixtures("_sums_inside_products")
def test_a_single_chunk_is_no_sum_and_stays_in_the_dtype_of_the_head(monkeypatch):
    def refuse(*args):
        raise AssertionError("a sum")

    monkeypatch.setattr(loss_module, "_added_inside", refuse)
    assert gradient_of_head(torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize(("device", "logits"), [("cuda", 2**28), ("cpu", 2**25), ("mps", 2**25)])
def test_a_chunk_is_as_large_as_the_device_has_memory_for(device: str, logits: int):
    assert loss_module.chunk_logits(torch.device(device)) == logits


def with_head_adapter(kind: AdapterKind):
    model = tiny_llama(tie=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        add_adapter(model, AdapterSettings(kind=kind, rank=4, target_modules=("auto", "lm_head")))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at the start, where a head that forgets its adapter is not noticed
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_adapter_on_the_head_counts_in_loss_and_gradients():
    batch = a_batch()
    lean, plain, other = (with_head_adapter(AdapterKind.LORA) for _ in range(3))
    ours, theirs = response_nll_sum(lean, batch), plain_nll_sum(plain, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    other.lm_head.scaling["default"] = 0.0
    assert abs(response_nll_sum(other, batch).item() - ours.item()) > 1e-2
    (ours / batch.response_tokens).backward()
    (theirs / batch.response_tokens).backward()
    gradients = [
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        for model in (lean, plain)
    ]
    assert "lm_head.lora_A.default.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_head_with_another_adapter_falls_back_to_whole_logits_and_says_so():
    sink, model, batch = RecordingSink(), with_head_adapter(AdapterKind.DORA), a_batch()
    loss = choose_batch_loss(model, batch, emit=sink).batch_loss
    assert "unknown head" in sink.of(Warned)[0].text
    assert loss(batch).item() == pytest.approx(plain_nll_sum(model, batch).item(), rel=1e-6)


def dft_by_formula(model, batch):
    """Return the sum of each token's loss times its probability, and of the losses, from autograd and one softmax."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    wanted = batch.targets != IGNORED
    likelihood = logits[wanted].log_softmax(-1).gather(1, batch.targets[wanted][:, None])[:, 0]
    return -(likelihood.exp().detach() * likelihood).sum(), -likelihood.detach().sum()


def sharp_llama(*, tie: bool):
    """Logits that are far apart."""
    model = tiny_llama(tie=tie)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(
            8
        )  # of more, float32 carries fewer digits than are compared
    return model


def half_guessed(model):
    """A batch of which every second target is the token that the model takes for the likeliest."""
    batch = a_batch()
    guesses = model(input_ids=batch.input_ids, use_cache=False).logits.argmax(-1)
    is_guessed = (batch.targets != IGNORED) & (torch.arange(batch.targets.shape[1]) % 2 == 0)
    return replace(batch, targets=torch.where(is_guessed, guesses, batch.targets))


@pytest.mark.parametrize("max_chunk_logits", [514 * 3, 2**25])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("compute", [response_nll_sum, plain_nll_sum])
def test_dynamic_fine_tuning_is_the_formula_in_float64(
    monkeypatch, compute, tie: bool, max_chunk_logits: int
):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", max_chunk_logits)
    model, exact = sharp_llama(tie=tie), sharp_llama(tie=tie).double()
    batch = half_guessed(model)
    sums, expected = compute(model, batch, Loss.DFT), dft_by_formula(exact, batch)
    assert minimized(sums).item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert nll_of(sums).item() == pytest.approx(expected[1].item(), rel=1e-6)
    assert 0.005 < expected[0].item() / expected[1].item() < 0.5  # else they could be taken for each other
    minimized(sums).backward()
    expected[0].backward()
    pairs = [
        (left.grad, right.grad) for left, right in zip(model.parameters(), exact.parameters(), strict=True)
    ]
    assert all((left - right).norm() <= 1e-5 * right.norm() for left, right in pairs)
    found, wanted = (
        torch.cat([part.flatten().double() for part in each]) for each in zip(*pairs, strict=True)
    )
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("transform", [LogitTransform(scale=0.25), LogitTransform(scale=1.5, softcap=5.0)])
def test_dynamic_fine_tuning_goes_through_scaled_and_capped_logits(transform: LogitTransform):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((7, 8), (11, 8)))
    targets = torch.randint(11, (7,), generator=generator)
    minimized(HeadNllSum.apply(hidden, weight, None, targets, transform, Loss.DFT)).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    likelihood = transform(hidden @ weight.t()).log_softmax(-1)[torch.arange(7), targets]
    (-likelihood.exp().detach() * likelihood).sum().backward()
    for ours, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_both_heads_agree_on_dynamic_fine_tuning_and_heldout_loss_stays_what_it_is():
    model = sharp_llama(tie=True)
    batch = half_guessed(model)
    chosen = choose_batch_loss(model, batch, emit=RecordingSink(), loss=Loss.DFT)
    assert chosen.kind == "lean"
    found = [
        heldout_nll(loss, [batch], stop=NeverStop()).nll
        for loss in (chosen.batch_loss, lambda part: response_nll_sum(model, part))
    ]
    assert found[0] == found[1]


class LargestLogits(TorchDispatchMode):
    """Notes the most numbers of any tensor that has a dimension of ``vocabulary`` and is no weight."""

    def __init__(self, vocabulary: int, weight: torch.Size):
        super().__init__()
        self.vocabulary, self.weight, self.numbers = vocabulary, sorted(weight), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            shape = sorted(tensor.shape) if isinstance(tensor, torch.Tensor) else []
            if self.vocabulary in shape and shape != self.weight:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("count", [2, 24])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_of_a_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch, count: int, tie: bool):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 514 * 3)
    model, batch = tiny_llama(tie=tie), a_batch(count)
    with LargestLogits(514, model.lm_head.weight.shape) as seen:
        response_nll_sum(model, batch).backward()
    assert batch.response_tokens > 3
    assert seen.numbers == 514 * 3


class MadeInShapes(TorchDispatchMode):
    """Notes the operations that make a tensor of one of ``shapes`` in memory of its own."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        self.shapes = {tensor.shape for tensor in tensors}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape in self.shapes:
            self.found += [str(function)] if made.untyped_storage().data_ptr() not in self.known else []
        return made


@pytest.mark.parametrize("tie", [True, False])
def test_a_pass_without_gradients_makes_none_of_the_head(tie: bool):
    model, batch = tiny_llama(tie=tie), a_batch()
    model.lm_head.bias = torch.nn.Parameter(torch.rand(514))
    with MadeInShapes(model.lm_head.weight, model.lm_head.bias) as seen:
        sums = response_nll_sum(model, batch)
    assert len(seen.found) == 2  # of weight and bias
    with MadeInShapes(model.lm_head.weight, model.lm_head.bias) as seen, torch.no_grad():
        alone = response_nll_sum(model, batch)
    assert not seen.found
    assert torch.equal(alone, sums)


@pytest.mark.parametrize("transform", [LogitTransform(scale=0.25), LogitTransform(scale=1.5, softcap=5.0)])
def test_scaled_and_capped_logits_have_the_gradients_of_autograd(transform: LogitTransform):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((7, 8), (11, 8), (11,))]
    hidden, weight, bias = (value.clone().requires_grad_() for value in values)
    hidden2, weight2, bias2 = (value.clone().requires_grad_() for value in values)
    targets = torch.randint(11, (7,), generator=generator)
    HeadNllSum.apply(hidden, weight, bias, targets, transform).backward()
    logits = transform(torch.nn.functional.linear(hidden2, weight2, bias2))
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for ours, theirs in ((hidden, hidden2), (weight, weight2), (bias, bias2)):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
def test_heldout_loss_does_not_depend_on_the_batch_size(max_batch_tokens: int):
    model, examples = tiny_llama(), random_examples(15)
    batches = batches_in_order_of_length(
        examples, rows=range(15), max_batch_tokens=max_batch_tokens, pad_id=PAD_ID
    )
    scored = heldout_nll(lambda batch: response_nll_sum(model, batch), batches, stop=NeverStop())
    one_by_one = [
        plain_nll_sum(model, collate([example], example_ids=[0], pad_id=PAD_ID)).item()
        for example in examples
    ]
    assert scored is not None
    assert scored.response_tokens == sum(int(example.loss_mask[1:].sum()) for example in examples)
    assert scored.nll == pytest.approx(sum(one_by_one), rel=1e-6)
