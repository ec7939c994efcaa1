"""The stages ``speed`` and ``compiled``: tokens a second and memory of training, as it is and with other kernels."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Check, free
from benchmarks.gpu.subjects import config_of, model_of, random_rows
from benchmarks.gpu.training import losses_of, timed_steps, trainer_of
from sftcli.modeling.kernels.ways import WAYS
from sftcli.training.loss import CHUNK_LOGITS
from sftcli.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "own forms, chunk 2^25": {"chunk": 2**25, "whose": ("",)},
    "own forms": {"whose": ("",)},
    "without Liger": {"whose": ("", "torch")},
    "deterministic": {"is_strict": True},
    "compiled": {"compiled": True},
}
COMPILED = "compiled"
_PROFILED = ("as it is", "own forms")
_LORA = {"adapter": {"kind": "lora", "rank": 16}}
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel")


def time_training(check: Check) -> None:
    """Time whole weights of 135M and 1.5B in every variant, LoRA on 8B with and without checkpointing, and on 135M."""
    if check.is_small:
        for variant in ("as it is", "own forms"):
            with check.guarded(variant):
                _time(check, "tiny", variant, steps=3, warm=1, is_profiled=variant == "as it is")
        return
    for kind, steps in (("smol", 12), ("qwen15", 6)):
        for variant in VARIANTS:
            if variant != COMPILED:
                with check.guarded(f"{kind} {variant}"):
                    _time(check, kind, variant, steps=steps, is_profiled=variant in _PROFILED)
    for changed in ({}, *({"gradient_checkpointing": how} for how in ("selective", "true", "offload"))):
        with check.guarded("llama8b, LoRA"):
            _time(check, "llama8b", "as it is", steps=3, warm=2, row_tokens=8192, **_LORA, **changed)
    with check.guarded("smol, LoRA"):
        _time(check, "smol", "as it is", steps=8, **_LORA)


def time_compiled(check: Check) -> None:
    """Time training with every decoder layer compiled, lengths left open; the first step compiles."""
    kinds = {"tiny": (2, {})}
    if not check.is_small:
        kinds = {"smol": (12, {}), "qwen15": (6, {}), "llama8b": (3, {"row_tokens": 8192, **_LORA})}
    for kind, (steps, changed) in kinds.items():
        with check.guarded(kind):
            begin = time.perf_counter()
            _time(check, kind, COMPILED, steps=steps, is_profiled=not check.is_small, **changed)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            check.say(kind, seconds_in_all=time.perf_counter() - begin, graphs=graphs)


def _time(
    check: Check,
    kind: str,
    variant: str,
    *,
    steps: int,
    warm: int = 3,
    is_profiled: bool = False,
    **changed: Any,
) -> None:
    free()
    sizes = {"mean": 40, "longest": 200} if check.is_small else {}
    rows = random_rows(32 * (steps + warm + 4), vocabulary=config_of(kind).vocab_size, **sizes)
    dtype = torch.bfloat16 if "adapter" in changed else torch.float32
    options = dict(VARIANTS[variant])
    with ExitStack() as stack:
        if chunk := options.pop("chunk", None):
            stack.enter_context(patch.dict(CHUNK_LOGITS, cuda=chunk))
        if whose := options.pop("whose", None):
            stack.enter_context(forms_of(whose))
        torch.use_deterministic_algorithms(options.pop("is_strict", False))
        stack.callback(torch.use_deterministic_algorithms, mode=False)
        model = model_of(kind, device=check.device, dtype=dtype)
        trainer = trainer_of(model, rows, device=check.device, **options, **changed)
        name = (
            kind
            + ", LoRA" * ("adapter" in changed)
            + (f", checkpointing {how}" if (how := changed.get("gradient_checkpointing")) else "")
        )
        found = timed_steps(check, trainer, warm=warm, steps=steps)
        check.say(f"{name}: {variant}", **found, rung=trainer.state.micro_batch_size)
        if is_profiled:
            _profile(check, trainer, f"{name}: {variant}")


@contextmanager
def forms_of(whose: Sequence[str]) -> Iterator[None]:
    """Leave of the faster forms on CUDA those of packages that are named; our own are named by nothing."""
    left = {part: tuple(way for way in found if way.by in whose) for part, found in WAYS["cuda"].items()}
    with patch.dict(WAYS, cuda=left):
        yield


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
    first = sorted(totals, key=lambda event: -getattr(event, key))[:8]
    check.say(
        f"profile of {name}",
        device_ms_per_step=sum(event.self_device_time_total for event in totals) / 2e3,
        launches_per_step=sum(event.count for event in totals if event.key in _LAUNCHES) / 2,
        top=[f"{event.key[:40]} {getattr(event, key) / 2e3:.2f}ms x{event.count // 2}" for event in first],
    )
