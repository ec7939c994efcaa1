"""The trainer of the service, on a tiny model and random examples."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaForCausalLM

from sftcli.config.auto import decide_open
from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import TrainingSettings
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.events import EventSink
from sftcli.modeling.formats.source_tensors import SourceTensors
from sftcli.runtime import dtype_name
from sftcli.services.runs.record import Decisions
from sftcli.services.train.build import assemble
from sftcli.services.train.loading import Compute, LoadedModel
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.distributed.group import Group
from sftcli.training.state import CheckpointStore
from sftcli.training.trainer import Trainer
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
    """Return what ``sft train`` would take steps with, had it loaded ``model`` and prepared ``examples``."""
    model = model or tiny_llama()
    values = {"training": settings, "checkpoint": checkpoint or CheckpointSettings(every_steps=0)}
    dataset = SimpleNamespace(
        train=examples or random_examples(20), heldout=heldout or ExampleList(), text=ExampleList()
    )
    decided = decide_open(
        Settings().model_copy(update=values), rows=100_000, parameters=10**10, heldout_fraction=0.0
    )
    inputs = TrainingInputs(
        settings=decided.settings,
        decided=decided,
        located=SimpleNamespace(name="tiny", folder=None),
        prepared=SimpleNamespace(dataset=dataset, tokenizer=SimpleNamespace(pad_id=PAD_ID)),
        fingerprints={},
        trusted_code={},
    )
    source = SourceTensors(stored={}, places={}, beside={}, is_plain=True)
    return assemble(
        LoadedModel(model=model, source=source),
        inputs,
        Decisions(precision=dtype_name(dtype)),
        compute=Compute(device=CPU, dtype=dtype, group=Group()),
        store=store,
        emit=emit,
    ).trainer
