"""Trainers on models and rows in memory, put together as a run does it, and what is read off them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.findings import Check
from benchmarks.gpu.subjects import CPU, PAD_ID, copy_on, memory_of, model_of, random_rows
from sftcli.config.schema.adapter import AdapterSettings
from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import OptimizerFacts, TrainingSettings
from sftcli.copies import host_copies
from sftcli.data.batches.batch import BatchPlan, Packing
from sftcli.events import Event
from sftcli.modeling.activations import checkpoint_activations, ways_down
from sftcli.modeling.adapter.adapter import add_adapter
from sftcli.modeling.kernels.compiled import compile_layers
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.kernels.told_positions import spare_search_of_own_positions
from sftcli.runtime import Kernels, set_kernels, total_memory_bytes, used_kernels
from sftcli.services.train.start.parallelism import whole_weights
from sftcli.training.loss import BatchLoss, response_nll_sum
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.out_of_memory import MemoryLadder
from sftcli.training.state import ForgetfulStore, TrainingSnapshot
from sftcli.training.trainer import Trainer
from sftcli.training.utilization import Gauge, Workload
from tests.support.training import ExampleList

_NO_PEAK = (
    1e18  # operations a second that no device reaches: a step that beats its peak would become the peak
)
Tensors = Mapping[str, torch.Tensor]


def trainer_of(
    model: PreTrainedModel,
    rows: ExampleList,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    adapter: Mapping[str, object] | None = None,
    row_tokens: int | None = None,
    packs: bool = True,
    emit: Callable[[Event], None] = lambda event: None,
    compiled: bool = False,
    memory: int | None = None,
    change_loss: Callable[[BatchLoss], BatchLoss] = lambda loss: loss,
    **changed: Any,
) -> Trainer:
    """Return a trainer.

    Args:
        model: What trains, or the base of an ``adapter``.
        rows: Its rows.
        device: Where the model is.
        dtype: Of products.
        adapter: Its settings.
        row_tokens: Most tokens in a pass; else as many as its longest rows would have.
        packs: Whether rows are packed; else each is padded.
        emit: Hears events.
        compiled: Whether torch compiles each decoder layer, instead of our own form of it.
        memory: Of the device, which says whether gradients are collected behind a pass; that of ``device`` itself if None.
        change_loss: Puts something around the loss of a pass.
        changed: Settings of the training.
    """
    steps = {
        "max_steps": 1000,
        "batch_size": 32,
        "micro_batch_size": 16,
        "warmup_steps": 0,
        "learning_rate": 1e-4,
    }
    settings = TrainingSettings.model_validate(steps | changed)
    if memory is None:
        memory = total_memory_bytes(device) if device.type == "cuda" else 0
    if adapter is not None:
        add_adapter(model, AdapterSettings.model_validate(adapter))
    if not compiled:
        fuse_layers(model, has_adapter=adapter is not None)
    weights = whole_weights(model, settings, dtype=dtype, has_adapter=adapter is not None, memory=memory)
    if settings.gradient_checkpointing.is_on:
        checkpoint_activations(model, settings.gradient_checkpointing)
    spare_search_of_own_positions(model)
    if not attend_by_document(model):
        raise RuntimeError("the model does not attend document by document")
    if compiled:
        compile_layers(model, traces_attention=device.type == "cuda")
    most = settings.micro_batch_size
    packing = Packing(row_tokens=row_tokens or most * max(rows.num_tokens)) if packs else None
    ladder = MemoryLadder(
        micro_batch_size=most,
        make_plan=lambda size: BatchPlan(
            rows,
            batch_size=settings.batch_size,
            micro_batch_size=size,
            pad_id=PAD_ID,
            seed=0,
            packing=packing and packing.reduced(size, most),
        ),
        ways=ways_down(model, settings.gradient_checkpointing, device),
        checkpoint=partial(checkpoint_activations, model),
    )
    return Trainer(
        settings=settings,
        checkpoint=CheckpointSettings(every_steps=0),
        weights=weights,
        optimizer=make_optimizer(weights.masters, settings, remainders=weights.remainders),
        batch_loss=change_loss(partial(response_nll_sum, model)),
        ladder=ladder,
        heldout_loss=None,
        store=ForgetfulStore(),
        emit=emit,
        device=device,
        gauge=Gauge(workload=Workload.of(model), peak_flops=_NO_PEAK),
    )


@contextmanager
def kernels(**changed: bool) -> Iterator[None]:
    """Let CUDA compute in the block as ``sft train`` does by itself, but for what is ``changed``."""
    before, defaults = used_kernels(), TrainingSettings(max_steps=1)
    as_trained = Kernels(
        deterministic=defaults.deterministic, tf32=defaults.tf32, tf32_convolutions=defaults.tf32
    )
    set_kernels(replace(as_trained, **changed))
    try:
        yield
    finally:
        set_kernels(before)


def _tiny_rows(check: Check) -> ExampleList:
    sizes = {"mean": 30, "longest": 60} if check.is_small else {"mean": 120, "longest": 600}
    return random_rows(200, vocabulary=1024, **sizes)


def tiny_trainer(
    check: Check, *, device: torch.device | None = None, seed: int = 0, **changed: Any
) -> Trainer:
    """Return the trainer of a tiny model whose weights are the same on every device."""
    device = device or check.device
    model = copy_on(model_of("tiny", device=CPU, seed=seed), device)
    steps = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3}
    return trainer_of(model, _tiny_rows(check), device=device, **(steps | changed))


def cannot_have(check: Check, optimizer: OptimizerFacts) -> str | None:
    """Return why ``optimizer`` cannot run here; None where it can. On CUDA a package that is missing is a failure."""
    if optimizer.needs_cuda and check.is_small:
        return "it needs CUDA"
    if optimizer.needs_bitsandbytes and check.is_small and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """Take ``steps``."""
    return [trainer.take_step().loss for _ in range(steps)]


def kept_snapshot(trainer: Trainer) -> TrainingSnapshot:
    """Return a snapshot in the host's memory, copied as a save beside the steps copies it."""
    snapshot = trainer.snapshot()
    copies = host_copies(trainer.device, [*snapshot.weights.values(), *snapshot.optimizer.values()])
    copy = snapshot.copied(copies)
    copies.hold()
    copies.wait()
    return copy


def masters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of the weights."""
    return {name: weight.detach().cpu().clone() for name, weight in trainer.weights.masters.items()}


def difference(expected: Tensors, found: Tensors) -> float:
    """Return how far ``found`` is from ``expected``, as a part of that; 0.0 only where both are equal bit for bit."""
    if all(torch.equal(expected[name], found[name]) for name in expected):
        return 0.0
    off = sum(float((expected[name].double() - found[name].double()).square().sum()) for name in expected)
    size = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    return max(math.sqrt(off / size), 1e-30)


def timed_steps(check: Check, trainer: Trainer, *, warm: int, steps: int) -> dict[str, float]:
    """Return the speed of ``steps`` after ``warm`` ones, with nothing left to do on the device at either end."""
    losses_of(trainer, warm)
    check.wait()
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    done = [trainer.take_step() for _ in range(steps)]
    check.wait()
    seconds = time.perf_counter() - begin
    tokens = sum(step.tokens for step in done)
    flops = sum((step.utilization or 0.0) * step.seconds for step in done) * _NO_PEAK
    return {
        "tokens_per_s": tokens / seconds,
        "ms_per_step": seconds / steps * 1e3,
        "tokens_per_step": tokens // steps,
        "tflops": flops / seconds / 1e12,
        "last_loss": done[-1].loss,
        **memory_of(check.device),
    }
