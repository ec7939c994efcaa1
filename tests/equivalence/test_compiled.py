"""Compiled decoder layers give the loss and the gradients of those that are not, in one graph for all of them and all lengths."""

from copy import deepcopy

import pytest
import torch

from sftcli.config.schema.training import Compile, TrainingSettings
from sftcli.data.batches.batch import collate, collate_packed
from sftcli.errors import ResourceError, UsageError
from sftcli.modeling.kernels.compiled import compile_layers, run_as_before
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.services.train import compiling
from sftcli.services.train.compiling import try_compiled, wants_compiled
from sftcli.training.loss import response_nll_sum
from sftcli.training.probes.choices import RowSharing
from tests.support.training import PAD_ID, random_examples, tiny_llama

# Of what goes into a layer, which torch asks for its gradient while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CPU = torch.device("cpu")
BACKEND = "aot_eager"  # traces and differentiates as any does, and compiles nothing


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def batches(lay_out):
    rows = [random_examples(4, seed=seed, longest=longest) for seed, longest in enumerate((12, 20, 40))]
    return [lay_out(some) for some in rows]


def padded(rows):
    return collate(rows, example_ids=range(len(rows)), pad_id=PAD_ID)


def packed(rows):
    return collate_packed([rows], example_ids=range(len(rows)), pad_id=PAD_ID)


def losses_and_gradients(model, some):
    found = []
    model.train()
    for batch in some:
        loss = response_nll_sum(model, batch)
        loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("lay_out", [padded, pytest.param(packed, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_equal_and_each_layer_and_length_shares_the_graphs(lay_out):
    plain, compiled = tiny_llama(), tiny_llama()
    if lay_out is packed:
        assert attend_by_document(plain)
        assert attend_by_document(compiled)
    some = batches(lay_out)
    compile_layers(compiled, traces_attention=lay_out is padded, backend=BACKEND)
    assert len(compiled.model.layers) > 1
    first = losses_and_gradients(compiled, some[:1])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rest = losses_and_gradients(compiled, some[1:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert (
        graphs == 1 or lay_out is packed
    )  # what is before an attention that is not traced, and what is behind
    for (loss, gradients), (found, found_gradients) in zip(
        losses_and_gradients(plain, some), first + rest, strict=True
    ):
        assert torch.equal(found, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_without_gradients_layers_run_as_their_class_says():
    model = tiny_llama()
    compile_layers(model, traces_attention=True, backend=BACKEND)
    with torch.no_grad():
        response_nll_sum(model, batches(padded)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    run_as_before(model)
    assert all("forward" not in vars(module) for module in model.modules())


def fails(graph, inputs):
    raise RuntimeError("no C++ compiler\nand more of it")


def attempt(setting, backend):
    heard, discarded = [], []
    model = tiny_llama()
    before = deepcopy(model.state_dict())
    names = try_compiled(
        model,
        batches(padded)[0],
        lambda batch: response_nll_sum(model, batch),
        settings=TrainingSettings(compile=setting, batch_size=8),
        sharing=RowSharing.NONE,
        discard=lambda: discarded.append(True),
        emit=heard.append,
        backend=backend,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert discarded
    return model, names, [event.text for event in heard]


def test_the_cost_is_told_first_and_nothing_but_the_layers_changes():
    _, names, (told,) = attempt(Compile.ON, "eager")
    assert names == ("LlamaDecoderLayer by torch.compile",)
    assert "compiling 2 decoder layers" in told


def test_a_compiler_that_fails_is_named_with_the_way_out():
    with pytest.raises(ResourceError) as caught:
        attempt(Compile.ON, fails)
    assert "no C++ compiler" in caught.value.message
    assert "training.compile=off" in caught.value.hint


def test_by_auto_layers_run_as_they_are_where_the_compiler_fails():
    model, names, (_, told) = attempt(Compile.AUTO, fails)
    assert names == ()
    assert "cannot be compiled" in told
    assert all("forward" not in vars(module) for module in model.modules())


def test_auto_compiles_where_it_was_measured_and_goes_on_as_it_did(monkeypatch):
    cuda, recorded = torch.device("cuda"), ("LlamaDecoderLayer by torch.compile",)
    assert not wants_compiled(Compile.AUTO, cuda, None, shares=False)
    assert wants_compiled(Compile.AUTO, cuda, recorded, shares=False)
    monkeypatch.setattr(compiling, "AUTO_COMPILES", frozenset({"cuda"}))
    assert wants_compiled(Compile.AUTO, cuda, None, shares=False)
    assert not wants_compiled(Compile.AUTO, cuda, ("LlamaMLP",), shares=False)
    assert not wants_compiled(Compile.AUTO, cuda, None, shares=True)
    assert not wants_compiled(Compile.OFF, cuda, recorded, shares=False)


def test_layers_whose_weights_are_shared_out_are_not_compiled():
    with pytest.raises(UsageError, match="share the weights"):
        wants_compiled(Compile.ON, CPU, None, shares=True)
