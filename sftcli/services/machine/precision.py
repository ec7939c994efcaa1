"""In which precision a training multiplies: decided by the processor, or by timings that agree, once for a machine."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Literal

import torch

from sftcli.cache import cache_folder
from sftcli.errors import SftError
from sftcli.own_files import OwnFile
from sftcli.runtime import (
    choose_dtype,
    dtype_name,
    has_bf16_products,
    has_matrix_units,
    processor,
    products_seconds,
)

REMEMBERED = "precision.json"  # in the cache folder
_WORTH_LEAVING = 1.1  # times as fast as bfloat16 that float32 must be to train in it
_LEAD = 9  # rounds of timings by which one side has to be ahead
_MAX_ROUNDS = 61  # after which they do not agree

Timing = Callable[[], float]  # multiplies once and tells the seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a machine has measured, as the cache keeps it."""

    precision: Literal["bf16", "fp32"]
    why: str


MEASUREMENTS = OwnFile(
    form=dict[str, Measured], hint="delete it: it is measured again"
)  # by a hash of the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """bf16, fp16 or fp32, and why, in a few words."""

    name: str
    why: str


def decide_precision(setting: str, device: torch.device) -> Precision:
    """Return the precision of matrix products for a new training with the setting ``setting``: auto, bf16, fp16 or fp32.

    Raises:
        ResourceError: The device cannot multiply in the one that is asked for.
    """
    chosen = dtype_name(choose_dtype(setting, device))
    if setting != "auto":
        return Precision(name=chosen, why="set by training.precision")
    if not has_bf16_products(device):
        units = ", only matrix units for float16" if chosen == "fp16" else ""
        return Precision(name=chosen, why=f"{device.type} has no bfloat16 products{units}")
    if device.type != "cpu":
        return Precision(name=chosen, why=f"{device.type} has bfloat16 products")
    if has_matrix_units():
        return Precision(name=chosen, why="the processor has bfloat16 matrix units")
    return _remembered(processor())


def compare_products(narrow: Timing, wide: Timing) -> Precision:
    """Return the precision that multiplies faster: ``wide`` (float32) if a clear majority of paired timings favors it.

    Each round times both, in turns first, so that what slows the machine down for a while slows both.
    """
    ratios: list[float] = []
    lead = 0  # of float32
    while abs(lead) < _LEAD and len(ratios) < _MAX_ROUNDS:
        if len(ratios) % 2:
            bf16, fp32 = narrow(), wide()
        else:
            fp32, bf16 = wide(), narrow()
        ratios.append(bf16 / max(fp32, 1e-9))
        lead += 1 if ratios[-1] > _WORTH_LEAVING else -1
    times = max(median(ratios), 1e-9)
    if lead >= _LEAD:
        return Precision(name="fp32", why=f"measured {times:.1f} times as fast as bf16")
    if times > 1 / _WORTH_LEAVING:
        return Precision(name="bf16", why="measured about as fast as fp32")
    return Precision(name="bf16", why=f"measured {1 / times:.1f} times as fast as fp32")


def _remembered(machine: str) -> Precision:
    """Return what ``machine``, this one, has measured before, else what it measures now, which is kept where it can be."""
    key = hashlib.sha256(machine.encode()).hexdigest()
    try:
        path = cache_folder() / REMEMBERED
    except SftError:  # a training can do without a cache
        return measured_here(machine)
    known = MEASUREMENTS.find_whole(path) or {}
    if key in known:
        return Precision(name=known[key].precision, why=known[key].why)
    measured = measured_here(machine)
    name: Literal["bf16", "fp32"] = "fp32" if measured.name == "fp32" else "bf16"
    with suppress(OSError):
        MEASUREMENTS.write(path, {**known, key: Measured(precision=name, why=measured.why)})
    return measured


@cache
def measured_here(machine: str) -> Precision:  # noqa: ARG001 - what it was measured on
    """Return what ``machine``, this one, measures, once in a process."""
    return compare_products(products_seconds(torch.bfloat16), products_seconds(torch.float32))
