"""What a step costs: memory of the decoder's body and of its head, each by itself."""

from functools import partial

import pytest

from sftcli.config.schema.training import TrainingSettings
from sftcli.training.probes.cost import measure_cost
from tests.support.recording import RecordingSink
from tests.support.tiny_experts import build_experts
from tests.support.training import build_trainer, tiny_llama


# The class of Llama 4's language model names a base model that it does not have.
@pytest.mark.parametrize("build", [tiny_llama, partial(build_experts, "llama4_text")])
def test_memory_of_the_head_is_not_that_of_the_whole_process(build):
    settings = TrainingSettings(max_steps=2, batch_size=4, micro_batch_size=4)
    trainer = build_trainer(settings=settings, store=None, emit=RecordingSink(), model=build())
    cost = measure_cost(trainer, last_step=2)
    assert cost.head < cost.peak / 2
