"""A trainer on a tiny model and random examples, built the way the service builds it."""

from functools import partial

import numpy as np
import torch
from transformers import LlamaForCausalLM

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import BatchPlan, batches_in_order_of_length
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.events import EventSink
from sftcli.modeling.load import checkpoint_activations
from sftcli.training.loss import heldout_nll, response_nll_sum
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.out_of_memory import MemoryLadder
from sftcli.training.state import CheckpointStore
from sftcli.training.trainer import Trainer
from sftcli.training.weights.masters import MasterWeights
from tests.support.tiny_model import tiny_config

PAD_ID = 2
CPU = torch.device("cpu")


class ExampleList(list):
    """Examples in memory."""

    @property
    def num_tokens(self):
        return [len(example.input_ids) for example in self]


def random_examples(count: int, *, seed: int = 0, longest: int = 24) -> ExampleList:
    """Examples of different lengths and numbers of trained tokens; the last token is always trained."""
    generator = np.random.default_rng(seed)
    examples = ExampleList()
    for line in range(count):
        length = int(generator.integers(4, longest))
        prompt = int(generator.integers(1, length - 1))
        mask = np.arange(length) >= prompt
        ids = generator.integers(3, 500, size=length).astype(np.int32)
        examples.append(Example(input_ids=ids, loss_mask=mask, origin=Origin(path="random", line=line + 1)))
    return examples


def tiny_llama(*, seed: int = 0, dropout: float = 0.0, tie: bool = True) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(tie=tie, dropout=dropout))


def build_trainer(
    *,
    settings: TrainingSettings,
    store: CheckpointStore,
    emit: EventSink,
    model: LlamaForCausalLM | None = None,
    examples: ExampleList | None = None,
    heldout: ExampleList | None = None,
    checkpoint: CheckpointSettings | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    model = model or tiny_llama()
    examples = examples or random_examples(20)
    weights = MasterWeights(model, compute_dtype=dtype)
    batch_loss = partial(response_nll_sum, model)

    def heldout_loss(stop):
        batches = batches_in_order_of_length(
            heldout, rows=range(len(heldout)), max_batch_tokens=64, pad_id=PAD_ID
        )
        return heldout_nll(batch_loss, batches, stop=stop)

    ladder = MemoryLadder(
        micro_batch_size=settings.micro_batch_size,
        make_plan=lambda size: BatchPlan(
            examples,
            batch_size=settings.batch_size,
            micro_batch_size=size,
            pad_id=PAD_ID,
            seed=settings.seed,
        ),
        checkpoint_activations=partial(checkpoint_activations, model),
    )
    return Trainer(
        settings=settings,
        checkpoint=checkpoint or CheckpointSettings(every_steps=0),
        weights=weights,
        optimizer=make_optimizer(weights.masters, settings),
        batch_loss=batch_loss,
        ladder=ladder,
        heldout_loss=heldout_loss if heldout else None,
        store=store,
        emit=emit,
        device=CPU,
    )
