"""Rows are packed only where the model itself is seen to keep them apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import Packing, collate, collate_packed
from sftcli.errors import UsageError
from sftcli.events import Notice, Warned
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.attention import attention_of
from sftcli.modeling.kernels.document_attention import attend_as_before, attend_by_document
from sftcli.training.loss import response_nll_sum
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.packing import attention_in_words, choose_packing
from tests.support.architectures import ARCHITECTURES, SMALL, build_architecture
from tests.support.recording import RecordingSink
from tests.support.tiny_model import tiny_config
from tests.support.training import PAD_ID, ExampleList, random_examples
from tests.support.varlen import EXACT, kernel_of

EXAMPLES = random_examples(20)
LONGEST = max(EXAMPLES.num_tokens)


class BlindToPositions(LlamaForCausalLM):
    """Counts positions through a whole row and sees all of it."""

    def forward(self, input_ids, use_cache=None, **told):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class BlindToBounds(LlamaForCausalLM):
    """Knows positions, but hands no bounds on to its attention."""

    def forward(self, input_ids, position_ids=None, use_cache=None, **told):
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


class CountsByTwo(LlamaForCausalLM):
    """Keeps documents apart, but counts their positions by two."""

    def forward(self, input_ids, position_ids=None, use_cache=None, **told):
        shifted = None if position_ids is None else position_ids * 2
        return super().forward(input_ids=input_ids, position_ids=shifted, use_cache=use_cache, **told)


def seeded(kind: type[LlamaForCausalLM], *, spread: float = 0.2) -> LlamaForCausalLM:
    config = tiny_config()
    config.initializer_range = spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


HYBRID = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LEAKING = {
    "falcon_h1": lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL, head_dim=8, **HYBRID)),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **SMALL, lru_width=32, block_types=["recurrent", "attention"], attention_window_size=8
        )
    ),
}
EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


def built(build, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().to(dtype)


def leak(layer, size):
    """Let each position see a little of the mean of all before it, whatever document they are of."""

    def add(module, inputs, output):
        counts = torch.arange(1, output.shape[1] + 1)[:, None]
        return (output.float() + size * output.float().cumsum(1) / counts).to(output.dtype)

    layer.register_forward_hook(add)


def leak_in_attention(layer, size):
    """The same in what the attention of a layer returns."""

    def add(module, inputs, output):
        made = output[0].float()
        counts = torch.arange(1, made.shape[1] + 1)[:, None]
        return ((made + size * made.cumsum(1) / counts).to(output[0].dtype), *output[1:])

    layer.self_attn.register_forward_hook(add)


LAYERS = 30


def deep(dtype=torch.float32):
    """A narrow Llama of many layers, so that what one of them does is a small part of the whole."""
    config = tiny_config()
    config.num_hidden_layers, config.initializer_range = LAYERS, 0.2
    return built(lambda: LlamaForCausalLM(config), dtype)


def choose(model, *, examples=EXAMPLES, **changes):
    sink = RecordingSink()
    settings = TrainingSettings(**({"micro_batch_size": 4} | changes))
    chosen = choose_packing(model, examples, longest=LONGEST, settings=settings, pad_id=PAD_ID, emit=sink)
    return chosen.packing, sink.of(Notice)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_model_can_be_packed(name, dtype):
    model = build_architecture(name).to(dtype)
    packing, _ = choose(model, packing="on")
    by_document = Packing(row_tokens=4 * LONGEST)
    assert packing == (Packing(row_tokens=LONGEST, rows=4) if name == "modern" else by_document)


def test_model_that_is_blind_to_documents_is_refused_where_packing_is_asked_for():
    with pytest.raises(UsageError, match="BlindToPositions lets packed documents attend to each other"):
        choose(seeded(BlindToPositions), packing="on")


@pytest.mark.parametrize("kind", [BlindToPositions, CountsByTwo])
def test_model_that_tells_documents_wrongly_is_not_packed_by_itself_and_it_is_said(kind):
    model = seeded(kind)
    packing, (notice,) = choose(model)
    assert packing is None
    assert "rows are not packed" in notice.text
    assert attention_of(model) == "sdpa"


def test_model_that_knows_only_positions_is_packed_by_mask_where_packing_is_asked_for():
    assert choose(seeded(BlindToBounds))[0] is None
    assert choose(seeded(BlindToBounds), packing="on")[0] == Packing(row_tokens=LONGEST, rows=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKING)
def test_model_whose_state_goes_on_is_not_packed(name, dtype):
    model = built(LEAKING[name], dtype)
    assert choose(model)[0] is None
    with pytest.raises(UsageError, match="lets packed documents attend to each other"):
        choose(model, packing="on")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", *EXPERTS])
def test_a_leak_of_a_thousandth_in_one_layer_is_seen(name, dtype):
    build = EXPERTS.get(name, lambda: seeded(LlamaForCausalLM))
    assert choose(built(build, dtype))[0] is not None
    model = built(build, dtype)
    leak(model.model.layers[0], 1e-3)
    assert choose(model)[0] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [None, 0, LAYERS // 2, LAYERS - 1])
def test_a_leak_of_a_thousandth_in_the_attention_of_one_of_many_layers_is_seen(place, dtype):
    model = deep(dtype)
    if place is not None:
        leak_in_attention(model.model.layers[place], 1e-3)
    assert (choose(model)[0] is None) == (place is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_leak_of_a_thousandth_in_the_attention_of_one_layer_is_seen_beside_experts(name, dtype):
    model = built(EXPERTS[name], dtype)
    leak_in_attention(model.model.layers[1], 1e-3)
    assert choose(model)[0] is None


@pytest.mark.parametrize("place", [0, LAYERS // 2, LAYERS - 1])
def test_positions_that_one_of_many_layers_counts_otherwise_are_seen(place):
    model = deep()

    def count_by_two(module, args, kwargs):
        if kwargs.get("cu_seq_lens_q") is None:  # right where each row is alone
            return None
        turned = model.model.rotary_emb(args[0], 2 * kwargs["position_ids"])
        return args, kwargs | {"position_embeddings": turned}

    model.model.layers[place].register_forward_pre_hook(count_by_two, with_kwargs=True)
    assert choose(model)[0] is None


class SeesMasksOfNoLayer(LlamaForCausalLM):
    """Has the mask of a window made that no layer of it uses, as Qwen2-MoE does."""

    def forward(self, input_ids, **told):
        embedded = self.model.embed_tokens(input_ids)
        create_sliding_window_causal_mask(self.config, embedded, None, None, told.get("position_ids"))
        return super().forward(input_ids=input_ids, **told)


@pytest.mark.parametrize(("kinds", "packs"), [("full_attention", True), ("sliding_attention", False)])
def test_a_window_that_attention_is_not_told_counts_where_a_layer_may_have_one(kinds, packs):
    model = seeded(SeesMasksOfNoLayer)
    model.config.sliding_window, model.config.layer_types = 8, [kinds] * 2
    assert (choose(model)[0] is not None) == packs


FORGETFUL = {
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**SMALL)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SMALL, partial_rotary_factor=0.5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORGETFUL)
def test_layers_that_hand_no_bounds_on_are_packed_all_the_same(name, dtype):
    model = built(FORGETFUL[name], dtype)
    assert choose(model)[0] is not None
    attend_as_before(model)
    leak(model.model.layers[0], 1e-3)
    assert choose(model)[0] is None


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", FORGETFUL)
def test_bounds_that_were_not_handed_on_are_right_in_both_passes(name, recomputes):
    def gradients(batches):
        model = built(FORGETFUL[name]).train()
        if recomputes:
            checkpoint_activations(model)
        assert attend_by_document(model)
        total = 0.0
        for batch in batches:
            nll = response_nll_sum(model, batch)
            nll.backward()
            total += nll.item()
        attend_as_before(model)
        assert not model.base_model._forward_pre_hooks
        return total, [weight.grad for weight in model.parameters()]

    alone = [collate([one], example_ids=[0], pad_id=PAD_ID) for one in EXAMPLES]
    together = [
        collate_packed([EXAMPLES[begin:end]], example_ids=range(begin, end), pad_id=PAD_ID)
        for begin, end in ((0, 9), (9, 20))
    ]
    (expected, wanted), (found, got) = gradients(alone), gradients(together)
    assert found == pytest.approx(expected, rel=1e-5)
    for left, right in zip(got, wanted, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()


def test_what_mixes_rows_in_training_alone_is_seen():
    model = deep()
    layer = model.model.layers[LAYERS // 2]

    def leak_in_training(module, inputs, output):
        counts = torch.arange(1, output.shape[1] + 1)[:, None]
        return output + 1e-3 * layer.training * output.cumsum(1) / counts

    layer.register_forward_hook(leak_in_training)
    model.eval()
    assert choose(model)[0] is None
    assert not model.training


def test_dropout_in_a_later_layer_is_no_leak_and_leaves_the_random_numbers_alone():
    model = deep()
    model.model.layers[LAYERS - 1].self_attn.attention_dropout = 0.5
    before = torch.get_rng_state()
    assert choose(model)[0] is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_are_as_before_when_they_were_tried():
    model = built(EXPERTS["mixtral"])
    choose(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_rows_of_one_token_over_and_over_are_told_apart_too():
    same = ExampleList(replace(one, input_ids=np.full_like(one.input_ids, 7)) for one in EXAMPLES[:3])
    assert choose(seeded(LlamaForCausalLM), examples=same)[0] is not None
    assert choose(seeded(BlindToPositions), examples=same)[0] is None


def test_model_as_it_is_first_initialized_is_told_apart_too():
    assert choose(seeded(BlindToPositions, spread=0.02))[0] is None
    assert choose(seeded(LlamaForCausalLM, spread=0.02))[0] is not None


def test_packing_can_be_switched_off_and_leaves_the_attention_alone():
    model = seeded(LlamaForCausalLM)
    assert choose(model, packing="off") == (None, [])
    assert attention_of(model) == "sdpa"


def test_rows_stay_apart_where_noise_on_embeddings_depends_on_their_length():
    packing, (notice,) = choose(seeded(LlamaForCausalLM), neftune_alpha=5.0)
    assert packing is None
    assert "NEFTune" in notice.text


def test_tokens_of_a_pass_can_be_set_and_always_hold_one_row():
    assert choose(seeded(LlamaForCausalLM), micro_batch_tokens=50)[0] == Packing(row_tokens=50)
    assert choose(seeded(LlamaForCausalLM), micro_batch_tokens=1)[0] == Packing(row_tokens=LONGEST)


def test_packing_of_half_the_micro_batch_has_half_the_tokens():
    assert Packing(row_tokens=96).reduced(2, 4) == Packing(row_tokens=48)
    assert Packing(row_tokens=24, rows=4).reduced(1, 4) == Packing(row_tokens=24, rows=1)


def on_device_with(monkeypatch, release="2.12", **changed):
    """Let the CPU be a device where a kernel for packed rows is what makes them worth it."""
    monkeypatch.setattr(
        "sftcli.modeling.kernels.document_attention.varlen_on", lambda device: kernel_of(release, **changed)
    )


def with_dropout():
    model = seeded(LlamaForCausalLM)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


HALF = frozenset({torch.bfloat16, torch.float16})
WITHOUT_KERNEL = {  # model, release, how the kernel differs from one that can do all, what is said
    "fp32": (
        lambda: seeded(LlamaForCausalLM),
        "2.12",
        {"dtypes": HALF},
        "in 16 bits, and this model in fp32",
    ),
    "card": (lambda: seeded(LlamaForCausalLM), "2.12", {"capability": (7, 5)}, "this one has 7.5"),
    "dropout": (with_dropout, "2.12", {}, "it has no dropout"),
    "window": (lambda: build_architecture("mistral"), "2.10", {}, "it has no windows"),
    "signature": (lambda: seeded(LlamaForCausalLM), "2.12", {"signature": None}, "takes other arguments"),
}


@pytest.mark.parametrize("case", WITHOUT_KERNEL)
def test_rows_are_not_packed_by_themselves_where_the_kernel_of_the_device_does_not_fit(monkeypatch, case):
    build, release, changed, words = WITHOUT_KERNEL[case]
    on_device_with(monkeypatch, release, **changed)
    model = build()
    packing, (notice,) = choose(model)
    assert packing is None
    assert notice.text.startswith("rows are not packed: torch's kernel for packed rows does not fit ")
    assert words in notice.text
    assert attention_of(model) == "sdpa"
    assert attention_in_words(model, RowSharing.NONE) == "sdpa padded"


def chosen_with(model, **given):
    sink = RecordingSink()
    settings = TrainingSettings(micro_batch_size=4, packing=given.pop("packing", "auto"))
    chosen = choose_packing(
        model, EXAMPLES, longest=LONGEST, settings=settings, pad_id=PAD_ID, emit=sink, **given
    )
    return chosen.kind, [event.text for event in sink.of(Warned)]


@pytest.mark.parametrize("given", [{"packing": "on"}, {"recorded": "bounds"}])
def test_rows_that_must_be_packed_are_without_a_kernel_too_and_it_is_said_that_this_is_slow(
    monkeypatch, given
):
    on_device_with(monkeypatch, dtypes=HALF)
    model = seeded(LlamaForCausalLM)
    kind, (warning,) = chosen_with(model, **given)
    assert kind is RowSharing.BOUNDS
    assert "one by one, which is slow" in warning
    assert "this model in fp32" in warning
    assert attention_in_words(model, kind) == "by document"


def test_a_run_that_goes_on_unpacked_stays_so_where_a_kernel_fits(monkeypatch):
    on_device_with(monkeypatch)
    assert chosen_with(seeded(LlamaForCausalLM), recorded="none") == (RowSharing.NONE, [])


@pytest.mark.parametrize("release", ["2.10", "2.11", "2.12"])
def test_rows_are_packed_where_the_kernel_fits(monkeypatch, release):
    on_device_with(monkeypatch, release)
    model = seeded(LlamaForCausalLM)
    assert chosen_with(model) == (RowSharing.BOUNDS, [])
    assert attention_in_words(model, RowSharing.BOUNDS) == "varlen"


def test_a_kernel_that_lets_documents_see_each_other_is_not_used(monkeypatch):
    own = kernel_of("2.12")

    def attend(query, key, value, bounds, *rest, **told):
        whole = bounds[[0, -1]].contiguous()
        return own.function(query, key, value, whole, whole, len(query), len(query), **told)

    monkeypatch.setattr(
        "sftcli.modeling.kernels.document_attention.varlen_on",
        lambda device: replace(own, function=attend, dtypes=EXACT),
    )
    packing, (notice,) = choose(seeded(LlamaForCausalLM))
    assert packing is None
    assert "keeps documents of one row apart" in notice.text


def test_what_computes_attention_without_a_kernel_for_it_is_named():
    model = seeded(LlamaForCausalLM)
    assert attention_in_words(model, RowSharing.MASK) == "sdpa masked"
    kind, _ = chosen_with(model)
    assert attention_in_words(model, kind) == "by document"
