"""The stage ``env``: what is here, and how fast it multiplies and copies."""

import inspect
import os
import platform
import time
from dataclasses import asdict
from importlib import metadata

import torch

from benchmarks.gpu.findings import Check
from sftcli.modeling.kernels.varlen import signature_of, varlen_on
from sftcli.runtime import matmul_flops, used_kernels

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "peft", "datasets", "pydantic", "accelerate", "trl", "liger_kernel",
    "bitsandbytes",
)  # fmt: skip


def describe_machine(check: Check) -> None:
    """Say versions and device, whether packed rows get torch's kernel, and the rates that others are compared with."""
    check.say("versions", python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    if check.device.type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        check.say(
            "device",
            name=facts.name,
            capability=f"{facts.major}.{facts.minor}",
            GB=facts.total_memory / 1e9,
            free_GB=torch.cuda.mem_get_info()[0] / 1e9,
            cuda=torch.version.cuda,
            alloc=os.environ.get("PYTORCH_ALLOC_CONF", ""),
        )
    with check.guarded("kernel"):
        from torch.nn.attention.varlen import varlen_attn

        signature = str(list(inspect.signature(varlen_attn).parameters))
        kernel = varlen_on(check.device)
        missing = "" if kernel is None else kernel.missing or ""
        known = signature_of(varlen_attn)
        check.judge(
            "packed rows get torch's kernel on CUDA",
            known is not None and not missing,
            form_since_torch=known and known.since,
            signature=signature,
            missing=missing,
        )
    check.say("kernels", **asdict(used_kernels()), cublas=os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    with check.guarded("peak"):
        check.say(
            "peak",
            bfloat16_tflops=_product_rate(check, torch.bfloat16),
            float32_tflops=_product_rate(check, torch.float32),  # without TF32, as training does it
            copy_TBps=_copy_rate(check),
            sft_measures_tflops=matmul_flops(check.device, torch.bfloat16) / 1e12,
        )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _product_rate(check: Check, dtype: torch.dtype) -> float:
    side = 512 if check.is_small else 8192
    count = 3 if check.is_small or dtype is torch.float32 else 30
    left, right = (torch.randn(side, side, device=check.device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(check, lambda: left @ right, count) / 1e12


def _copy_rate(check: Check) -> float:
    size = 2**24 if check.is_small else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(check, lambda: target.copy_(source), 10) / 1e12


def _seconds(check, work, count):
    for _ in range(5):
        work()
    check.wait()
    begin = time.perf_counter()
    for _ in range(count):
        work()
    check.wait()
    return (time.perf_counter() - begin) / count
