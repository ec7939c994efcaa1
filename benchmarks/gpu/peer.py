"""The stage ``trl``: the same rows and sizes in TRL, in the ways that its users train fastest."""

import time
from typing import Any

import torch

from benchmarks.gpu.findings import Check, free
from benchmarks.gpu.subjects import config_of, memory_of, model_of, random_rows
from tests.support.smollm2 import VOCABULARY, lay_tokenizer

_GROUPED = {"train_sampling_strategy": "group_by_length"}
_LIGER = {"use_liger_kernel": True}
MODES: dict[str, dict[str, Any]] = {
    "grouped": _GROUPED,
    "grouped, Liger": _GROUPED | _LIGER,
    "packed, Liger": {"packing": True} | _LIGER,
    "grouped, Liger, compiled": _GROUPED | _LIGER | {"torch_compile": True},
}


def time_peer(check: Check) -> None:
    """Say its speed, memory and last loss, of 135M and 1.5B."""
    if check.is_small:
        with check.guarded("grouped"):
            _time(check, "tiny", "grouped", steps=3, warm=1)
        return
    for kind, steps in (("smol", 10), ("qwen15", 6)):
        for mode in MODES:
            if mode.endswith("compiled") and kind != "qwen15":
                continue
            with check.guarded(f"{kind} {mode}"):
                _time(check, kind, mode, steps=steps, warm=3)


def _time(check: Check, kind: str, mode: str, *, steps: int, warm: int) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    free()
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    longest = 200 if check.is_small else 1024
    vocabulary = min(VOCABULARY, config_of(kind).vocab_size)
    mean = 40 if check.is_small else 250
    rows = random_rows(32 * (steps + warm + 4), vocabulary=vocabulary, mean=mean, longest=longest)
    model = model_of(kind, device=check.device)
    clock = _clock(check)
    trainer = SFTTrainer(
        model=model,
        args=_config(check, MODES[mode], steps=steps + warm, longest=longest),
        train_dataset=Dataset.from_list(
            [
                {"input_ids": row.input_ids.tolist(), "completion_mask": row.loss_mask.astype(int).tolist()}
                for row in rows
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(
            lay_tokenizer(check.work / "tokenizer", check.tokenizer)
        ),
        callbacks=[clock],
    )
    tokens = _counted(trainer)
    trainer.train()
    timed = tokens[warm * len(tokens) // (steps + warm) :]
    seen = sum(map(int, timed))
    seconds = clock.marks[-1] - clock.marks[warm - 1]
    check.say(
        f"{kind} {mode}",
        tokens_per_s=seen / seconds,
        ms_per_step=seconds / steps * 1e3,
        tokens_per_step=seen // steps,
        last_loss=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        attention=model.config._attn_implementation,
        **memory_of(check.device),
    )


def _config(check, options, *, steps, longest):
    from trl import SFTConfig

    # Packed rows are full: 8 of 1024 tokens hold what 32 of 250 do.
    batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    if options.get("packing"):
        batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return SFTConfig(
        output_dir=str(check.work / "trl"),
        max_steps=steps,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=check.device.type == "cpu",
        logging_steps=1,
        report_to=[],
        max_length=longest,
        completion_only_loss=True,
        gradient_checkpointing=False,
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.01,
        dataloader_num_workers=0,
        **batch,
        **options,
    )


def _clock(check):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        marks: list[float] = []  # noqa: RUF012 - one clock a class

        def on_step_end(self, *args, **named):
            check.wait()
            self.marks.append(time.perf_counter())

    return Clock()


def _counted(trainer):
    """Let ``trainer`` note the tokens of each pass in the list that is returned."""
    tokens, compute_loss = [], trainer.compute_loss

    def counting(model, inputs, *rest, **named):
        mask = inputs.get("attention_mask")
        tokens.append(mask.sum() if mask is not None else inputs["input_ids"].numel())
        return compute_loss(model, inputs, *rest, **named)

    trainer.compute_loss = counting
    return tokens
