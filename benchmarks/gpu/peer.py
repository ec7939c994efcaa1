"""The stage ``trl``: the same rows and sizes in TRL, in the ways that its users train fastest."""

import time
from typing import Any

import torch

from benchmarks.gpu.findings import Check, free
from benchmarks.gpu.subjects import config_of, memory_of, model_of, random_rows
from tests.support.smollm2 import VOCABULARY, lay_tokenizer

_GROUPED = {"train_sampling_strategy": "group_by_length"}
_LIGER = {"use_liger_kernel": True}
_RANK = 16
MODES: dict[str, dict[str, Any]] = {
    "grouped": _GROUPED,
    "grouped, Liger": _GROUPED | _LIGER,
    "packed": {"packing": True},
    "packed, Liger": {"packing": True} | _LIGER,
    "packed, Liger, compiled": {"packing": True} | _LIGER | {"torch_compile": True},
}


# kind, steps, rank of a LoRA adapter or 0, modes: those that cost compile time last, since the stage may be cut
_TIMED = (
    ("smol", 10, 0, ("packed, Liger", "grouped, Liger", "grouped")),
    ("qwen15", 6, 0, ("packed, Liger", "grouped, Liger")),
    ("llama8b", 3, _RANK, ("packed, Liger", "grouped, Liger")),
    ("qwen15", 6, 0, ("packed, Liger, compiled",)),
)
_TIMED_SMALL = (("tiny", 2, 0, ("grouped", "packed")), ("tiny", 2, _RANK, ("grouped",)))


def time_peer(check: Check) -> None:
    """Say its speed, memory and last loss: 135M and 1.5B whole, LoRA on 8B."""
    for kind, steps, rank, modes in _TIMED_SMALL if check.is_small else _TIMED:
        for mode in modes:
            with check.guarded(f"{kind} {mode}"):
                _time(check, kind, mode, rank=rank, steps=steps, warm=1 if check.is_small else 2)


def _time(check: Check, kind: str, mode: str, *, rank: int, steps: int, warm: int) -> None:
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
    model = model_of(kind, device=check.device, dtype=torch.bfloat16 if rank else torch.float32)
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
        peft_config=_adapter(rank) if rank else None,
    )
    tokens = _counted(trainer)
    trainer.train()
    timed = tokens[warm * len(tokens) // (steps + warm) :]
    seen = sum(map(int, timed))
    seconds = clock.marks[-1] - clock.marks[warm - 1]
    check.say(
        f"{kind} {mode}" + ", LoRA" * bool(rank),
        tokens_per_s=seen / seconds,
        ms_per_step=seconds / steps * 1e3,
        tokens_per_step=seen // steps,
        last_loss=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        attention=model.config._attn_implementation,
        **memory_of(check.device),
    )


def _adapter(rank):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


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
