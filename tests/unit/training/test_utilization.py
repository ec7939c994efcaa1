"""What a step needs, against what torch itself counts while it runs."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import collate, collate_packed
from sftcli.runtime import matmul_flops
from sftcli.training.embeddings import freeze_embeddings
from sftcli.training.loss import response_nll_sum
from sftcli.training.utilization import Gauge, Workload
from tests.support.recording import MemoryStore, RecordingSink
from tests.support.tiny_model import tiny_config
from tests.support.training import CPU, PAD_ID, build_trainer, random_examples, tiny_llama

HEADS_TIMES_SIZE_TIMES_LAYERS = 32 * 2


def one_row():
    return collate(random_examples(1, longest=80), example_ids=[0], pad_id=PAD_ID)


def counted(model, batch):
    """What torch counts, less the half of attention that a causal mask throws away and torch's plain kernel computes."""
    with FlopCounterMode(display=False) as counter:
        response_nll_sum(model, batch).backward()
    thrown_away = batch.tokens**2 - batch.attended_pairs
    return counter.get_total_flops() - 12 * HEADS_TIMES_SIZE_TIMES_LAYERS * thrown_away


def eager_llama(**changes):
    config = tiny_config(**changes)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tie", [True, False])
def test_a_step_on_all_weights_needs_what_torch_counts(tie):
    model, batch = eager_llama(tie=tie), one_row()
    assert Workload.of(model).flops([batch]) == pytest.approx(counted(model, batch), rel=0.002)


def test_a_frozen_head_needs_no_gradient_of_its_own():
    model, batch = eager_llama(), one_row()
    freeze_embeddings(model)
    model.enable_input_require_grads()
    assert Workload.of(model).flops([batch]) == pytest.approx(counted(model, batch), rel=0.002)


def test_frozen_matrices_below_an_adapter_need_four_operations_a_weight():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = inject_adapter_in_model(config, eager_llama())
    model.enable_input_require_grads()
    batch = one_row()
    assert Workload.of(model).flops([batch]) == pytest.approx(counted(model, batch), rel=0.002)


def test_a_token_goes_through_some_experts_only():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, **shape, **heads, **experts))
    expert, router, attention = 3 * 32 * 48, 8 * 32, 4 * 32 * 32
    assert Workload.of(model).per_token == 6 * (2 * expert + router + attention)


def test_packed_and_padded_rows_need_the_same():
    examples, workload = random_examples(4), Workload.of(tiny_llama())
    ids = range(4)
    padded = collate(examples, example_ids=ids, pad_id=PAD_ID)
    packed = collate_packed([examples], example_ids=ids, pad_id=PAD_ID)
    apart = [collate([row], example_ids=[0], pad_id=PAD_ID) for row in examples]
    assert workload.flops([padded]) == workload.flops([packed]) == workload.flops(apart)


def test_the_rate_of_the_machine_is_measured_once_and_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    rate = matmul_flops(CPU, torch.float32)
    assert 1e8 < rate < 1e15
    assert matmul_flops(CPU, torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), state)


def step_with(gauge):
    settings = TrainingSettings(max_steps=1, batch_size=4, micro_batch_size=2)
    trainer = build_trainer(settings=settings, store=MemoryStore(), emit=RecordingSink())
    trainer.gauge = gauge
    return trainer.plan.window(0), trainer.take_step()


def test_a_step_tells_its_share_of_the_peak():
    workload = Workload.of(tiny_llama())
    window, step = step_with(Gauge(workload=workload, peak_flops=1e15))
    assert step.utilization == pytest.approx(workload.flops(window) / step.seconds / 1e15)


def test_a_step_that_beats_the_measured_peak_is_the_peak():
    window = [one_row()]
    gauge = Gauge(workload=Workload.of(tiny_llama()), peak_flops=1.0)
    assert [gauge(window, seconds) for seconds in (2.0, 1.0, 4.0)] == [1.0, 1.0, 0.25]


def test_no_share_is_told_of_a_peak_that_was_not_measured():
    assert step_with(None)[1].utilization is None


def test_no_share_is_told_of_a_model_whose_layers_differ_and_no_run_ends_for_it():
    class PerLayer:
        num_attention_heads, num_hidden_layers, hidden_size = 4, 2, 32

        def get_text_config(self):
            return self

        @property
        def head_dim(self):
            raise RuntimeError("each layer has its own")  # transformers' is no AttributeError either

    model = tiny_llama()
    known = Gauge.of(model, peak_flops=1e9)
    model.config = PerLayer()
    assert Gauge.of(model, peak_flops=1e9) == known
    PerLayer.hidden_size = None
    assert Gauge.of(model, peak_flops=1e9) is None
