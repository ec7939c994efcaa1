"""The stages ``speed`` and ``compiled``: tokens a second and memory of training, as it is and in other ways."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Check, free
from benchmarks.gpu.subjects import config_of, model_of, random_rows
from benchmarks.gpu.training import cannot_have, kernels, losses_of, timed_steps, trainer_of
from sftcli.config.schema.training import OPTIMIZERS, Checkpointing, OptimizerName
from sftcli.modeling.kernels.ways import WAYS, Part
from sftcli.runtime import held_peak_bytes, reset_peak_memory
from sftcli.training.loss import CHUNK_LOGITS
from sftcli.training.probes.cost import measure_cost
from sftcli.training.trainer import Trainer

AS_IT_IS, COMPILED, NOT_REPEATING, AS_PEFT = "as it is", "compiled", "not deterministic", "peft's form"
_PLANNED = (0.85, 1.15)  # parts of what a run holds
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How something is trained: as ``sft train`` does by itself, but for what is named.

    ``kernels`` are settings of ``Kernels``, ``chunk`` the logits of a chunk, ``whose`` the packages whose forms are taken (our own
    are named by nothing), ``without`` the parts that run as the model has them, ``trainer`` what ``trainer_of`` is told.
    """

    kernels: Mapping[str, bool] = field(default_factory=dict)
    chunk: int | None = None
    whose: Sequence[str] | None = None
    without: Sequence[Part] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    AS_IT_IS: Variant(),
    NOT_REPEATING: Variant(kernels={"deterministic": False}),
    "own forms": Variant(whose=("",)),
    "own forms, chunk 2^25": Variant(whose=("",), chunk=2**25),
    "without Liger": Variant(whose=("", "torch")),
    AS_PEFT: Variant(without=(Part.LOW_RANK,)),
    "fp16": Variant(trainer={"dtype": torch.float16}),
    "fp32": Variant(trainer={"dtype": torch.float32, "packs": False}),
    "fp32, tf32": Variant(trainer={"dtype": torch.float32, "packs": False}, kernels={"tf32": True}),
    COMPILED: Variant(trainer={"compiled": True}),
} | {
    f"optimizer {name}": Variant(trainer={"optimizer": name})
    for name in OPTIMIZERS
    if name is not OptimizerName.ADAMW
}
_LORA = {"adapter": {"kind": "lora", "rank": 16}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One subject with the variants that it is timed in."""

    kind: str
    steps: int
    variants: Sequence[str]
    warm: int = 3
    changed: Mapping[str, Any] = field(default_factory=dict)
    profiled: Sequence[str] = ()
    is_planned: bool = False

    @property
    def name(self) -> str:
        """What results call it."""
        return (
            self.kind
            + ", LoRA" * ("adapter" in self.changed)
            + (f", checkpointing {how}" if (how := self.changed.get("gradient_checkpointing")) else "")
        )


_EIGHT = {"row_tokens": 8192} | _LORA
TIMED = (  # what matters most comes first: the stage may be cut
    Timed(kind="smol", steps=12, variants=(AS_IT_IS, NOT_REPEATING), profiled=(AS_IT_IS,), is_planned=True),
    Timed(kind="qwen15", steps=6, variants=(AS_IT_IS, NOT_REPEATING), profiled=(AS_IT_IS,), is_planned=True),
    Timed(kind="llama8b", steps=3, warm=2, variants=(AS_IT_IS, AS_PEFT), changed=_EIGHT, profiled=(AS_IT_IS,)),
    Timed(kind="smol", steps=8, variants=(AS_IT_IS,), changed=_LORA),
    Timed(kind="smol", steps=8, variants=("without Liger", "own forms"), profiled=("own forms",)),
    Timed(kind="smol", steps=6, variants=[name for name in VARIANTS if name.startswith("optimizer")]),
    Timed(kind="smol", steps=6, variants=("fp16", "fp32", "fp32, tf32", "own forms, chunk 2^25")),
    Timed(kind="qwen15", steps=4, variants=("without Liger", "own forms", "own forms, chunk 2^25")),
    *(
        Timed(kind="llama8b", steps=3, warm=2, variants=(AS_IT_IS,), changed=_EIGHT | {"gradient_checkpointing": how})
        for how in Checkpointing
        if how.is_on
    ),
)  # fmt: skip
TIMED_COMPILED = (
    Timed(kind="smol", steps=12, variants=(COMPILED,), profiled=(COMPILED,)),
    Timed(kind="qwen15", steps=6, variants=(COMPILED,), profiled=(COMPILED,)),
    Timed(kind="llama8b", steps=3, variants=(COMPILED,), changed=_EIGHT, profiled=(COMPILED,)),
)
_SMALL = (
    Timed(
        kind="tiny",
        steps=2,
        warm=1,
        variants=[name for name in VARIANTS if name != COMPILED],
        profiled=(AS_IT_IS,),
        is_planned=True,
    ),
    Timed(kind="tiny", steps=2, warm=1, variants=(AS_IT_IS, AS_PEFT), changed=_LORA),
)
_SMALL_COMPILED = (Timed(kind="tiny", steps=2, variants=(COMPILED,)),)


def time_training(check: Check) -> None:
    """Time what ``TIMED`` says, and what kernels that repeat their bits cost."""
    for timed in _SMALL if check.is_small else TIMED:
        found = {variant: _guarded(check, timed, variant) for variant in timed.variants}
        plain, free_ones = found.get(AS_IT_IS), found.get(NOT_REPEATING)
        if plain and free_ones:
            check.say(f"{timed.name}: time of a step that repeats its bits", ratio=free_ones / plain)
        if timed.is_planned:
            with check.guarded(f"{timed.name}: plan"):
                _compare_plan(check, timed)


def compare_plans(check: Check) -> None:
    """Compare the plans of all that has one with what runs hold."""
    for timed in TIMED:
        if timed.is_planned:
            _compare_plan(check, timed)


def time_compiled(check: Check) -> None:
    """Time training with every decoder layer compiled, lengths left open; the first step compiles."""
    for timed in _SMALL_COMPILED if check.is_small else TIMED_COMPILED:
        begin = time.perf_counter()
        _guarded(check, timed, COMPILED)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        check.say(f"{timed.name}: graphs", seconds_in_all=time.perf_counter() - begin, graphs=graphs)


def _guarded(check: Check, timed: Timed, variant: str) -> float | None:
    """Say the speed of ``timed`` in a ``variant``, and return it."""
    name = f"{timed.name}: {variant}"
    optimizer = VARIANTS[variant].trainer.get("optimizer")
    if optimizer and (why := cannot_have(check, OPTIMIZERS[optimizer])):
        check.leave_out(name, why)
        return None
    with check.guarded(name), varied(VARIANTS[variant]):
        trainer = _trainer(check, timed, VARIANTS[variant])
        found = timed_steps(check, trainer, warm=timed.warm, steps=timed.steps)
        check.say(name, **found, rung=trainer.state.micro_batch_size)
        if variant in timed.profiled:
            _profile(check, trainer, name)
        return found["tokens_per_s"]
    return None


def _trainer(check: Check, timed: Timed, variant: Variant) -> Trainer:
    free()
    sizes = {"mean": 40, "longest": 200} if check.is_small else {}
    count = 32 * (timed.steps + timed.warm + 4)
    rows = random_rows(count, vocabulary=config_of(timed.kind).vocab_size, **sizes)
    dtype = torch.bfloat16 if "adapter" in timed.changed else torch.float32
    model = model_of(timed.kind, device=check.device, dtype=dtype)
    return trainer_of(model, rows, device=check.device, **timed.changed, **variant.trainer)


@contextmanager
def varied(variant: Variant) -> Iterator[None]:
    """Let training run in a ``variant`` where it is not the trainer that is told."""
    ways = {
        part: tuple(way for way in found if variant.whose is None or way.by in variant.whose)
        for part, found in WAYS["cuda"].items()
        if part not in variant.without
    }
    with ExitStack() as stack:
        stack.enter_context(kernels(**variant.kernels))
        stack.enter_context(patch.dict(WAYS, cuda=ways))
        if variant.chunk:
            stack.enter_context(patch.dict(CHUNK_LOGITS, cuda=variant.chunk))
        yield


def _compare_plan(check: Check, timed: Timed) -> None:
    """Compare what ``sft train --plan`` measures with what the steps of a run hold."""
    name = f"{timed.name}: the plan tells the memory that a run holds"
    trainer = _trainer(check, timed, VARIANTS[AS_IT_IS])
    trainer.ladder.is_short = True
    planned = measure_cost(trainer, last_step=timed.steps).peak
    del trainer
    free()
    trainer = _trainer(check, timed, VARIANTS[AS_IT_IS])
    reset_peak_memory(check.device)
    losses_of(trainer, timed.steps)
    ratio = planned / held_peak_bytes(check.device)
    facts = {"ratio": ratio, "planned_GB": planned / 1e9}
    if check.is_small:
        check.leave_out(name, "the memory of a process depends on how many steps there were", **facts)
    else:
        check.judge(name, _PLANNED[0] < ratio < _PLANNED[1], **facts)


def _profile(check: Check, trainer: Trainer, name: str) -> None:
    """Keep the 30 operations of two steps that take the most time, and say the first of them."""
    is_cuda = check.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as seen:
        losses_of(trainer, 2)
        check.wait()
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    totals = seen.key_averages()
    table = totals.table(sort_by=key, row_limit=30, max_name_column_width=60)
    file = "profile-" + "".join(letter if letter.isalnum() else "-" for letter in name) + ".txt"
    (check.out / file).write_text(table, encoding="utf-8")
    # An operation has the time of the kernels that it launched, which are there by themselves too.
    kernels_alone = [event for event in totals if event.device_type is not DeviceType.CPU]
    first = sorted(kernels_alone or totals, key=lambda event: -getattr(event, key))[:8]
    check.say(
        f"profile of {name}",
        device_ms_per_step=sum(event.self_device_time_total for event in kernels_alone) / 2e3,
        launches_per_step=sum(event.count for event in totals if event.key in _LAUNCHES) / 2,
        top=[f"{event.key[:40]} {getattr(event, key) / 2e3:.2f}ms x{event.count // 2}" for event in first],
    )
