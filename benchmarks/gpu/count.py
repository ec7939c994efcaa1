"""Kernels, bytes and waits of one training step as it would run on CUDA, counted without a GPU: python -m benchmarks.gpu.count.

Shapes are real, numbers are not: see ``counter.py``. Bytes are those of tensors that are read and written beside matrix products
and attention; what a cache spares is not known here. Nothing is timed.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import PretrainedConfig

from benchmarks.gpu.counter import Counts, DeviceCounter
from benchmarks.gpu.subjects import config_of, model_of_config
from benchmarks.gpu.training import trainer_of
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from tests.support.training import ExampleList

META = torch.device("meta")
_FUSED_OPTIMIZERS = "torch.optim.optimizer._get_fused_kernels_supported_devices"
_LISTS = "torch.utils._foreach_utils._get_foreach_kernels_supported_devices"
_ATTENTION = "sftcli.modeling.kernels.document_attention._varlen"
_FIRST_ID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One step: a model of random weights, and a row of documents of equal length, half of each with loss."""

    name: str
    kind: str
    tokens: int
    documents: int
    rank: int = 0  # of a LoRA adapter; 0 trains all weights


SUBJECTS = (
    Subject(name="135M, all weights", kind="smol", tokens=8192, documents=32),
    Subject(name="1.5B, all weights", kind="qwen15", tokens=16384, documents=64),
    Subject(name="8B, LoRA of rank 16", kind="llama8b", tokens=8192, documents=32, rank=16),
)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let tensors on ``meta`` take the ways of those on CUDA."""
    with ExitStack() as stack:
        for name in (_FUSED_OPTIMIZERS, _LISTS):
            stack.enter_context(patch(name, lambda: ["meta", "cuda"]))
        stack.enter_context(patch(_ATTENTION, lambda query, value: varlen_attn))
        yield


def count_step(
    config: PretrainedConfig,
    *,
    tokens: int,
    documents: int,
    rank: int = 0,
    passes: int = 0,
    settings: Mapping[str, object] | None = None,
) -> Counts:
    """Return the counts of one step of a model of this ``config``, the second, on one row of ``documents``.

    With ``passes`` the documents are rows of their own, in so many micro-batches.
    """
    length = tokens // documents
    rows = _rows(documents, length)
    selected = documents * (length - length // 2)  # positions with loss
    adapter = {"kind": "lora", "rank": rank} if rank else None
    with as_on_cuda(), DeviceCounter(selected=selected) as counter:
        model = model_of_config(config, device=META, dtype=torch.bfloat16 if rank else torch.float32)
        trainer = trainer_of(
            model,
            rows,
            device=META,
            adapter=adapter,
            row_tokens=tokens,
            batch_size=documents,
            micro_batch_size=documents // (passes or 1),
            packs=not passes,
            **(settings or {}),
        )
        trainer.asks_device = True
        trainer.take_step(is_followed=True)  # the optimizer makes its state
        counter.counts = Counts()
        trainer.take_step(is_followed=True)
    return counter.counts


def _rows(count: int, length: int) -> ExampleList:
    mask = np.arange(length) >= length // 2
    ids = np.full(length, _FIRST_ID, dtype=np.int32)
    return ExampleList(
        Example(input_ids=ids, loss_mask=mask, origin=Origin(path="random", line=line + 1))
        for line in range(count)
    )


def main() -> None:
    print(f"{'one step':<42}{'kernels':>9}{'GB beside products':>20}{'waits':>7}{'uploads':>9}")
    for subject in SUBJECTS:
        counts = count_step(
            config_of(subject.kind),
            tokens=subject.tokens,
            documents=subject.documents,
            rank=subject.rank,
        )
        row = f"{subject.name}, {subject.tokens:,} tokens"
        print(
            f"{row:<42}{counts.total:>9,}{counts.other_bytes / 1e9:>20.1f}{counts.waits.total():>7}{counts.uploads.total():>9}",
            flush=True,
        )
        for place, times in counts.waits.most_common():
            print(f"    waits {times} x {place}")


if __name__ == "__main__":
    main()
