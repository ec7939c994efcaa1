"""The stage ``correct``: losses, gradients, repeats, optimizers, adapters, memory that runs out, answers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.answers import check_answers
from benchmarks.gpu.exactness import check_attention, check_precisions, check_repeats, check_waits
from benchmarks.gpu.findings import Check, free
from benchmarks.gpu.speed import AS_PEFT, VARIANTS, varied
from benchmarks.gpu.subjects import CPU, PAD_ID, config_of, copy_on, memory_of, model_of, random_rows
from benchmarks.gpu.training import (
    cannot_have,
    difference,
    kept_snapshot,
    losses_of,
    tiny_trainer,
    trainer_of,
)
from sftcli.config.schema.training import OPTIMIZERS, OptimizerName
from sftcli.data.batches.batch import collate, collate_packed
from sftcli.events import Event, MemoryEased
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights.masters import MasterWeights
from tests.support.training import ExampleList

_RATES = {OptimizerName.MUON: 2e-2}  # where that of AdamW is none
_LEAST_FALL = 0.5  # of the loss in 8 steps, as a part of that with AdamW
_LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-3, 5e-2)}  # of the loss and of the gradients


def check_numbers(check: Check) -> None:
    """Compare everything with a CPU in float32, or with itself."""
    for name, work in CHECKS.items():
        with check.guarded(name):
            work(check)


def check_gradients(check: Check) -> None:
    """Compare loss and gradients of packed rows with those of rows alone."""
    for kind in ("tiny", "tinyqwen"):
        _check_gradients(check, kind)


def _check_gradients(check: Check, kind: str) -> None:
    """Compare packed rows on the device with rows alone on the CPU."""
    base, rows = model_of(kind, device=CPU), _documents(check)
    expected_loss, expected = _loss_and_gradients(copy_on(base, CPU), rows, packed=False, dtype=torch.float32)
    for name, dtype, packed, fused in (
        ("fp32 packed", torch.float32, True, False),
        ("fp32 packed, fused", torch.float32, True, True),
        ("bf16 alone", torch.bfloat16, False, False),
        ("bf16 packed, fused", torch.bfloat16, True, True),
    ):
        model = copy_on(base, check.device)
        left_alone = fuse_layers(model).left_alone if fused else ()
        loss, gradients = _loss_and_gradients(model, rows, packed=packed, dtype=dtype)
        loss_off = abs(loss - expected_loss) / expected_loss
        gradients_off = difference(expected, gradients)
        most_loss, most_gradients = _LIMITS[dtype]
        check.judge(
            f"{kind} {name} = alone on the CPU in fp32",
            loss_off < most_loss and gradients_off < most_gradients and not left_alone,
            loss_off=loss_off,
            gradients_off=gradients_off,
            left_alone=list(left_alone),
        )
        free()


def _documents(check: Check) -> ExampleList:
    """Return rows of 2 to 700 tokens, on a CPU to 70."""
    lengths = (70, 33, 5, 26, 2, 19) if check.is_small else (700, 33, 5, 256, 2, 129, 480)
    pool = random_rows(400, vocabulary=1024, mean=max(lengths), longest=2 * max(lengths), seed=3)
    made = ExampleList()
    for length in lengths:
        row = next(row for row in pool if len(row.input_ids) >= length)
        pool.remove(row)
        mask = row.loss_mask[-length:].copy()
        mask[-1] = True
        made.append(replace(row, input_ids=row.input_ids[-length:], loss_mask=mask))
    return made


def _loss_and_gradients(
    model: PreTrainedModel, rows: ExampleList, *, packed: bool, dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    weights = MasterWeights(model, compute_dtype=dtype)
    model.train()
    if packed:
        attend_by_document(model)
        batches = [collate_packed([rows], example_ids=range(len(rows)), pad_id=PAD_ID)]
    else:
        batches = [collate([row], example_ids=[index], pad_id=PAD_ID) for index, row in enumerate(rows)]
    total = 0.0
    for batch in batches:
        nll = response_nll_sum(model, batch.to(model.device))
        nll.backward()
        total += nll.item()
    named = weights.masters.items()
    return total, {name: weight.grad.detach().cpu() for name, weight in named if weight.grad is not None}


def check_optimizers(check: Check) -> None:
    """Let each optimizer that there is train, and go on from a snapshot."""
    falls: list[float] = []
    for name, facts in OPTIMIZERS.items():
        if why := cannot_have(check, facts):
            check.leave_out(f"optimizer {name}", why)
            continue
        with check.guarded(f"optimizer {name}"):
            changed = {"optimizer": name, "learning_rate": _RATES.get(name, 1e-3)}
            trainer = tiny_trainer(check, **changed)
            losses = losses_of(trainer, 8)
            snapshot = kept_snapshot(trainer)
            following = losses_of(trainer, 2)
            resumed = tiny_trainer(check, seed=1, **changed)
            resumed.restore(snapshot)
            again = losses_of(resumed, 2)
            falls.append(losses[0] - losses[-1])  # AdamW comes first
            off = max(abs(one - other) for one, other in zip(following, again, strict=True))
            check.judge(
                f"optimizer {name}",
                falls[-1] > _LEAST_FALL * falls[0] > 0 and off < 5e-3,
                falls=falls[-1],
                with_adamw=falls[0],
                resumed_off=off,
            )


def check_adapters(check: Check) -> None:
    """Let adapters train; the losses of LoRA have to be those of peft's own form."""
    for kind in ("lora", "dora"):
        losses = _adapter_losses(check, kind)
        check.judge(f"adapter {kind}", losses[-1] < losses[0] - 0.02, first=losses[0], last=losses[-1])
    ours = _adapter_losses(check, "lora", dtype=torch.float32)
    with varied(VARIANTS[AS_PEFT]):
        theirs = _adapter_losses(check, "lora", dtype=torch.float32)
    off = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    check.judge("losses of LoRA in float32 are those of peft's form", off < 1e-4, off=off)


def _adapter_losses(check: Check, kind: str, **changed: Any) -> list[float]:
    adapter = {"kind": kind, "rank": 8}
    return losses_of(tiny_trainer(check, adapter=adapter, learning_rate=5e-3, **changed), 10)


def check_memory(check: Check) -> None:
    """Let memory run out, on CUDA for real, and compare with the steps that had enough."""
    kind = "tiny" if check.is_small else "smol"
    sizes = {"mean": 40, "longest": 100} if check.is_small else {}
    rows = random_rows(64, vocabulary=config_of(kind).vocab_size, **sizes)
    eased: list[str] = []

    def note(event: Event, /) -> None:
        if isinstance(event, MemoryEased):
            eased.append(event.text)

    free()
    plain = trainer_of(model_of(kind, device=check.device), rows, device=check.device)
    expected = losses_of(plain, 2)
    peak = memory_of(check.device)["peak_GB"]
    kept = torch.cuda.memory_allocated() / 1e9 if check.device.type == "cuda" else 0.0
    del plain
    free()
    trainer = trainer_of(
        model_of(kind, device=check.device),
        rows,
        device=check.device,
        emit=note,
        change_loss=_refuse_large if check.is_small else lambda loss: loss,
    )
    _allow(check, kept + 0.35 * (peak - kept))
    try:
        found = losses_of(trainer, 2)
    finally:
        _allow(check, None)
    off = max(abs(one - other) for one, other in zip(expected, found, strict=True))
    check.judge(
        "memory that runs out is eased, with the same losses",
        bool(eased) and off < 2e-2,
        eased=eased,
        loss_off=off,
        peak_GB=peak,
        rung=trainer.state.micro_batch_size,
    )


def _refuse_large(loss):
    def limited(batch):
        if batch.tokens > 500:
            raise torch.OutOfMemoryError("made up")
        return loss(batch)

    return limited


def _allow(check: Check, gigabytes: float | None) -> None:
    """Let this process use ``gigabytes`` of the device, or all of it."""
    if check.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes / total)


CHECKS: Mapping[str, Callable[[Check], None]] = {
    "gradients": check_gradients,
    "attention": check_attention,
    "precisions": check_precisions,
    "repeats": check_repeats,
    "waits": check_waits,
    "optimizers": check_optimizers,
    "adapters": check_adapters,
    "memory": check_memory,
    "answers": check_answers,
}
"""What the stage does, in order; ``tests/gpu`` has each as a test."""
