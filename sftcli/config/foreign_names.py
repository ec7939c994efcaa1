"""Flags of other trainers, and what to write here in their place."""

from collections.abc import Mapping

# By name without dashes at the start and with underscores inside: Hugging Face's Trainer and TRL, LLaMA-Factory, axolotl, Unsloth,
# and the scripts of the Modern LLM pipeline.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "--model NAME": (
        "model_name_or_path", "model_name", "base_model", "pretrained_model_name_or_path", "checkpoint", "pretrain_checkpoint",
    ),
    "--data FILE": (
        "dataset", "dataset_name", "datasets", "dataset_path", "dataset_text_field", "train_file", "train_data", "data_path",
    ),
    "--data FILE:N, which takes N rows": ("max_samples", "max_train_samples"),
    "--heldout FILE, or --set data.heldout_fraction=0.1": (
        "eval_dataset", "eval_file", "validation_file", "val_size", "val_set_size", "validation_split_percentage",
    ),
    "--run NAME, in the folder --runs DIR": ("output_dir", "output", "run_name", "overwrite_output_dir"),
    "--epochs N": ("num_train_epochs", "num_epochs"),
    "--batch-size N, the rows of a step on all devices; --set training.micro_batch_size=N is the most at once": (
        "per_device_train_batch_size", "train_batch_size", "micro_batch_size", "per_gpu_train_batch_size",
    ),
    "--batch-size N; how many micro-batches that is follows": ("gradient_accumulation_steps",),
    "--max-tokens N": (
        "max_seq_length", "max_seq_len", "max_length", "cutoff_len", "sequence_len", "model_max_length", "block_size",
    ),
    "--lora": ("use_peft", "use_lora", "finetuning_type"),
    "--rank N": ("lora_r", "lora_rank", "peft_lora_r"),
    "--set adapter.alpha=N": ("lora_alpha",),
    "--set adapter.dropout=X": ("lora_dropout",),
    "--set adapter.target_modules=NAMES": ("lora_target_modules", "lora_target", "target_modules"),
    "--adapter qlora": ("load_in_4bit", "quantization_bit", "qlora"),
    "--eval-every N": ("eval_steps", "evaluation_strategy", "eval_strategy", "evals_per_epoch"),
    "--save-every N": ("save_steps", "save_strategy", "saves_per_epoch"),
    "--set checkpoint.keep_last=N": ("save_total_limit",),
    "--set training.log_every_steps=N": ("logging_steps",),
    "--track TRACKER": ("report_to", "wandb_project"),
    "--set training.schedule=NAME": ("lr_scheduler_type", "lr_scheduler"),
    "--set training.warmup_fraction=X": ("warmup_ratio",),
    "--set training.optimizer=NAME": ("optim",),
    "--set training.precision=bf16": ("bf16", "torch_dtype", "dtype"),
    "--set training.precision=fp16": ("fp16",),
    "--set training.tf32=true": ("tf32",),
    "--set training.deterministic=true": ("full_determinism",),
    "--set training.neftune_alpha=X": ("neftune_noise_alpha",),
    "--set training.loss=dft": ("loss_type",),
    "--set training.router_aux_loss=X": ("router_aux_loss_coef", "moe_aux_loss_coef"),
    "--set training.parallel=fsdp with --processes N": ("deepspeed", "fsdp", "fsdp_config"),
    "--set training.context_processes=N with --processes N": (
        "context_parallel_size", "sequence_parallel_size", "sequence_parallel_degree", "cp_size",
    ),
    "--processes N": ("num_processes", "nproc_per_node"),
    "--template NAME": ("chat_template", "prompt_template", "conversation_template"),
    "sft resume RUN, or --resume auto": ("resume_from_checkpoint",),
    "CUDA_VISIBLE_DEVICES=0 before the command for one GPU, CUDA_VISIBLE_DEVICES= for the CPU": (
        "device", "device_map", "gpu", "gpus", "no_cuda", "use_cpu",
    ),
    "not needed: this stage is what `sft train` does, and its final model goes into the next": ("stage",),
    "--plan": ("dry_run",),
    "not needed: only answers are trained": ("completion_only_loss", "assistant_only_loss", "train_on_inputs", "mask_prompt"),
}  # fmt: skip
OURS: Mapping[str, str] = {name: ours for ours, names in _NAMES.items() for name in names}
