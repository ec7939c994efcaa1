"""Of the stage ``correct``: the attention of packed rows, precisions, repeats bit for bit, waits for the device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn import functional

from benchmarks.gpu.count import count_step
from benchmarks.gpu.findings import Check
from benchmarks.gpu.subjects import CPU, config_of
from benchmarks.gpu.training import difference, kept_snapshot, kernels, losses_of, masters_of, tiny_trainer
from sftcli.modeling.kernels.varlen import SIGNATURES, Asked, Varlen, varlen_on
from tests.support.varlen import kernel_of

_LENGTHS = (37, 1, 64, 5)
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of attention, as a part of its size
_MOST_WAITS = 2
_TF32_ROUNDING = (1e-5, 1e-2)  # least and most that it is off
# query heads, key heads, head size, window, scale
_ASKED = {
    "heads alone": (4, 4, 64, None, None),
    "grouped heads": (9, 3, 64, None, None),
    "heads of 128": (4, 2, 128, None, None),
    "a window": (4, 2, 64, 9, None),
    "a scale": (4, 2, 64, None, 0.05),
    "a scale by a power of two": (4, 2, 64, None, 0.25),
}


def check_attention(check: Check) -> None:
    """Compare torch's kernel for packed rows with dense attention in float32; on a CPU stand-ins of each release that is known."""
    kernel = varlen_on(check.device)
    kernels_told = [kernel_of(signature.since) for signature in SIGNATURES] if kernel is None else [kernel]
    for told in kernels_told:
        assert told.signature is not None
        for what, (heads, key_heads, size, window, scale) in _ASKED.items():
            name = f"attention told as since torch {told.signature.since}: {what}"
            with check.guarded(name):
                parts = _random_parts(check, heads, key_heads, size)
                asked = Asked.of(*parts, scale=scale, window=window, dropout=0.0)
                if lack := told.lacks(asked):
                    check.leave_out(name, lack)
                    continue
                found = _attended(told, parts, asked)
                expected = _dense(parts, window=window, scale=scale)
                off = [_off(one, other) for one, other in zip(found, expected, strict=True)]
                check.judge(
                    name, max(off) < _ROUNDING[asked.dtype], output_off=off[0], gradients_off=max(off[1:])
                )


def _random_parts(check: Check, heads: int, key_heads: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(_LENGTHS), size) for count in (heads, key_heads, key_heads)]
    dtype = torch.float32 if check.is_small else torch.bfloat16  # which the kernel of CUDA is for
    return [torch.randn(shape, generator=generator).to(check.device, dtype) for shape in shapes]


def _attended(kernel: Varlen, parts: list[torch.Tensor], asked: Asked) -> list[torch.Tensor]:
    bounds = functional.pad(torch.tensor(_LENGTHS).cumsum(0), (1, 0)).to(parts[0].device, torch.int32)
    leaves = [part.clone().requires_grad_() for part in parts]
    made = kernel.attend(*leaves, bounds=bounds, longest=max(_LENGTHS), asked=asked).transpose(1, 2)
    return [made.detach(), *torch.autograd.grad(made.sum(1).square().sum(), leaves)]


def _dense(parts: list[torch.Tensor], *, window: int | None, scale: float | None) -> list[torch.Tensor]:
    """Return the same by a mask over the whole row, on the CPU."""
    document = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))
    place = torch.arange(len(document))
    back = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (back >= 0) & (back < (window or len(place)))
    leaves = [part.to(CPU, torch.float32).requires_grad_() for part in parts]
    made = functional.scaled_dot_product_attention(*leaves, attn_mask=seen, scale=scale, enable_gqa=True)
    return [made.detach(), *torch.autograd.grad(made.sum(1).square().sum(), leaves)]


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().float() - expected).norm() / expected.norm())


def check_precisions(check: Check) -> None:
    """Compare the losses of 8 steps with those of the CPU in float32; and TF32 products with exact ones."""
    expected = losses_of(tiny_trainer(check, device=CPU, dtype=torch.float32), 8)
    limits = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
    for dtype, most in limits.items():
        trainer = tiny_trainer(check, dtype=dtype)
        found = losses_of(trainer, 8)
        off = max(abs(one - other) for one, other in zip(expected, found, strict=True))
        check.judge(
            f"losses of 8 steps in {str(dtype).removeprefix('torch.')} are those of the CPU in float32",
            off < most,
            off=off,
            loss_scale=trainer.state.loss_scale,
        )
    exact = _product_off(check)
    check.judge("float32 products are exact by default", exact < _TF32_ROUNDING[0], off=exact)
    if check.device.type != "cuda" or torch.cuda.get_device_capability(check.device) < (8, 0):
        check.leave_out(
            "training.tf32 rounds them to 10 bits", "only CUDA of capability 8.0 and later has it"
        )
        return
    with kernels(tf32=True):
        off = _product_off(check)
    check.judge("training.tf32 rounds them to 10 bits", _TF32_ROUNDING[0] < off < _TF32_ROUNDING[1], off=off)


def _product_off(check: Check) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    made = (left.to(check.device, torch.float32) @ right.to(check.device, torch.float32)).cpu().double()
    return float((made - left @ right).norm() / (left @ right).norm())


def check_repeats(check: Check) -> None:
    """Compare two runs, and one that goes on from a snapshot of the third step, bit for bit; also float16 and LoRA."""
    subjects = {
        "all weights": {},
        "float16": {"dtype": torch.float16},
        "LoRA": {"adapter": {"kind": "lora", "rank": 8}},
    }
    for name, changed in subjects.items():
        twice, again = _differences(check, changed)
        check.judge(
            f"two runs and a resumed one are equal bit for bit, {name}",
            twice == again == 0.0,
            twice=twice,
            resumed=again,
        )
    with kernels(deterministic=False):
        twice, again = _differences(check, {})
    # Some kernels repeat their bits by chance, so that this is no verdict.
    check.say(
        "training.deterministic=false: how far two runs and a resumed one differ", twice=twice, resumed=again
    )


def _differences(check: Check, changed: dict[str, object]) -> tuple[float, float]:
    first, second = tiny_trainer(check, **changed), tiny_trainer(check, **changed)
    losses_of(first, 6)
    losses_of(second, 3)
    snapshot = kept_snapshot(second)
    losses_of(second, 3)
    resumed = tiny_trainer(check, seed=0 if "adapter" in changed else 1, **changed)
    resumed.restore(snapshot)
    losses_of(resumed, 3)
    twice, again = (difference(masters_of(first), masters_of(other)) for other in (second, resumed))
    return twice, again


def check_waits(check: Check) -> None:
    """Count how often a step waits for the device: as CUDA warns of it, or on a CPU on tensors without numbers."""
    if check.device.type == "cuda":
        found = _waits_on_cuda(check)
    else:
        found = [*count_step(config_of("tiny"), tokens=256, documents=8).waits.elements()]
    check.judge(
        "a step waits for the device twice at most", len(found) <= _MOST_WAITS, waits=len(found), where=found
    )


def _waits_on_cuda(check: Check) -> list[str]:
    trainer = tiny_trainer(check)
    for _ in range(3):
        trainer.take_step(is_followed=True)
    check.wait()
    with _events_counted() as waited, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.take_step(is_followed=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [f"{one.filename}:{one.lineno}" for one in seen if "synchron" in str(one.message).lower()]
    return told + waited


@contextmanager
def _events_counted() -> Iterator[list[str]]:
    """Note each wait for an event, of which CUDA does not warn."""
    waited: list[str] = []
    wait = torch.cuda.Event.synchronize

    def noted(event: torch.cuda.Event) -> None:
        waited.append("an event")
        wait(event)

    with patch.object(torch.cuda.Event, "synchronize", noted):
        yield waited
