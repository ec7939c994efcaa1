"""Kernels, bytes and waits of one training step as it would run on CUDA, counted without a GPU: python -m benchmarks.gpu.count.

Shapes are real, numbers are not: see ``counter.py``. Bytes are those of tensors that are read and written beside matrix products
and attention; what a cache spares is not known here. Nothing is timed.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import PretrainedConfig

from benchmarks.gpu.counter import Counts, DeviceCounter
from benchmarks.gpu.stand_ins import stand_ins
from benchmarks.gpu.subjects import config_of, model_of_config
from benchmarks.gpu.training import trainer_of
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.modeling.kernels import ways
from sftcli.modeling.kernels.varlen import Varlen, signature_of
from sftcli.services.train.start.parallelism import has_room_for_gradients
from sftcli.training import loss
from tests.support.training import ExampleList

META = torch.device("meta")
_KERNEL = Varlen(
    function=varlen_attn, signature=signature_of(varlen_attn), capability=(9, 0), release=torch.__version__
)
_FUSED_OPTIMIZERS = "torch.optim.optimizer._get_fused_kernels_supported_devices"
_LISTS = "torch.utils._foreach_utils._get_foreach_kernels_supported_devices"
_ATTENTION = "sftcli.modeling.kernels.document_attention.varlen_on"
_FIRST_ID = 3
_MEMORY = 80 * 10**9  # of an H100


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


class Forms(StrEnum):
    """Whose kernels run."""

    OWN = "our own functions, chunks of 2^25 logits"  # as on other devices
    TORCH = "torch's norms"  # without the extra
    LIGER = "torch's norms, Liger's gates and turns"


@contextmanager
def as_on_cuda(forms: Forms = Forms.LIGER) -> Iterator[None]:
    """Let tensors on ``meta`` take the ways of those on CUDA."""
    with ExitStack() as stack:
        stack.enter_context(stand_ins(has_liger=forms is Forms.LIGER))
        if forms is not Forms.OWN:
            stack.enter_context(patch.dict(ways.WAYS, meta=ways.WAYS["cuda"]))
            stack.enter_context(patch.dict(loss.CHUNK_LOGITS, meta=loss.CHUNK_LOGITS["cuda"]))
            for module, name in ((ways, "WITH_ADAPTER"), (loss, "_SUMS_IN_PRODUCT")):
                stack.enter_context(patch.object(module, name, getattr(module, name) | {"meta"}))
        for name in (_FUSED_OPTIMIZERS, _LISTS):
            stack.enter_context(patch(name, lambda: ["meta", "cuda"]))
        stack.enter_context(patch(_ATTENTION, lambda device: _KERNEL))
        yield


def count_step(
    config: PretrainedConfig,
    *,
    tokens: int,
    documents: int,
    rank: int = 0,
    passes: int = 0,
    forms: Forms = Forms.LIGER,
    memory: int = _MEMORY,
    settings: Mapping[str, object] | None = None,
) -> Counts:
    """Return the counts of one step of a model of this ``config``, the second, on one row of ``documents``.

    With ``passes`` the documents are rows of their own, in so many micro-batches. By ``memory``, that of the device, gradients
    are collected behind a pass.
    """
    length = tokens // documents
    rows = _rows(documents, length)
    selected = documents * (length - length // 2)  # positions with loss
    adapter = {"kind": "lora", "rank": rank} if rank else None
    with as_on_cuda(forms), DeviceCounter(selected=selected) as counter:
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
            memory=memory,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts of a whole step."""

    kernels: int
    other_bytes: int
    waits: int
    uploads: int

    @classmethod
    def of(cls, counts: Counts) -> "Totals":
        """Return those of ``counts``."""
        return cls(
            kernels=counts.total,
            other_bytes=counts.other_bytes,
            waits=counts.waits.total(),
            uploads=counts.uploads.total(),
        )

    def with_layers(self, more: "Totals", times: int) -> "Totals":
        """Return these and ``times`` what ``more`` has beyond them."""
        return Totals(
            **{name: had + times * (getattr(more, name) - had) for name, had in asdict(self).items()}
        )


def counts_of(subject: Subject, forms: Forms) -> tuple[Counts, Counts]:
    """Count ``subject`` with one layer and with two, as with all of them."""
    config = config_of(subject.kind)
    whole = model_of_config(config, device=META, dtype=torch.bfloat16)
    is_large = not subject.rank and not has_room_for_gradients(whole, torch.bfloat16, _MEMORY)
    found = []
    for config.num_hidden_layers in (1, 2):
        counts = count_step(
            config,
            tokens=subject.tokens,
            documents=subject.documents,
            rank=subject.rank,
            forms=forms,
            memory=0 if is_large else _MEMORY,
        )
        found.append(counts)
    return found[0], found[1]


def totals_of(subject: Subject, forms: Forms) -> Totals:
    """Return what all layers of ``subject`` come to: each asks for the same."""
    one, two = map(Totals.of, counts_of(subject, forms))
    return one.with_layers(two, config_of(subject.kind).num_hidden_layers - 1)


def kinds_of(subject: Subject, forms: Forms) -> dict[str, int]:
    """Return how many kernels of each kind a layer of ``subject`` takes, most first."""
    one, two = counts_of(subject, forms)
    return dict((two.kernels - one.kernels).most_common())


def main() -> None:
    """Print the table, or with ``--layer`` what a layer of each model consists of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="store_true", help="kernels of a layer by kind")
    if parser.parse_args().layer:
        for subject in SUBJECTS:
            kinds = kinds_of(subject, Forms.LIGER)
            told = ", ".join(f"{count} {name}" for name, count in kinds.items())
            print(f"{subject.name}: {sum(kinds.values())} a layer: {told}", flush=True)
        return
    print(f"{'one step':<64}{'kernels':>9}{'GB beside products':>20}{'waits':>7}{'uploads':>9}")
    for subject in SUBJECTS:
        print(f"{subject.name}, {subject.tokens:,} tokens")
        for forms in Forms:
            found = totals_of(subject, forms)
            print(
                f"    {forms:<60}{found.kernels:>9,}{found.other_bytes / 1e9:>20.1f}{found.waits:>7}{found.uploads:>9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
