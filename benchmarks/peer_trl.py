"""TRL's SFTTrainer on the same rows, as one line of JSON. Runs with the Python of an environment that has TRL.

The rows come tokenized, as {"input_ids", "completion_mask"} a line, so that both tools train the same tokens. With
``--in-order`` they are taken as they stand in the file; with ``--heldout`` their loss is measured after the last step.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from datasets import load_dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP = 3  # steps not timed: the first ones are handed their memory by the system
GROUP = {"train_sampling_strategy": "group_by_length"}
MODES = {
    "pad": {},
    "group": GROUP,
    "pack": {"packing": True},
    "best": GROUP | {"bf16": False},  # where float32 products are faster; the caller sets the allocator
}
if torch.cuda.is_available():
    MODES["best"] = {"packing": True, "use_liger_kernel": True}


def wait():
    """Wait until nothing is left to do on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def held_bytes():
    """Return the most memory that was held: on CUDA what was reserved there, else that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepTimes(TrainerCallback):
    """Notes how long each step takes."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        """Start the clock."""
        wait()
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Stop it."""
        wait()
        self.seconds.append(time.perf_counter() - self.begin)


class InOrder(SFTTrainer):
    """Takes the rows as they stand."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@torch.no_grad()
def heldout_loss(model, path):
    """Return nats per completion token, row by row in float32."""
    nll, count = 0.0, 0
    model = model.float().eval()
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            ids = torch.tensor([row["input_ids"]], device=model.device)
            mask = torch.tensor(row["completion_mask"], device=model.device)[1:].bool()
            logits = model(input_ids=ids).logits[0, :-1][mask]
            nll += functional.cross_entropy(logits, ids[0, 1:][mask], reduction="sum").item()
            count += int(mask.sum())
    return nll / count


def main():
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--heldout")
    parser.add_argument("--in-order", action="store_true")
    parser.add_argument("--mode", choices=MODES, default="group")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = load_dataset("json", data_files=args.rows, split="train")
    config = SFTConfig(
        output_dir="peer_trl_out",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-5,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        max_length=args.max_length,
        completion_only_loss=True,  # left out, rows that come tokenized are trained as a whole, whatever their mask says
        gradient_checkpointing=False,
        save_strategy="no",
        seed=0,
        lr_scheduler_type="cosine",
        disable_tqdm=True,
        adam_beta2=0.95,
        weight_decay=0.01,
        **{"bf16": True} | MODES[args.mode],
    )
    times, tokens, padded = StepTimes(), [], []
    kind = InOrder if args.in_order else SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = kind(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[times]
    )
    compute_loss = trainer.compute_loss

    def counting(model, inputs, *rest, **named):
        mask = inputs.get("attention_mask")
        tokens.append(
            mask.sum() if mask is not None else inputs["input_ids"].numel()
        )  # read behind all steps
        padded.append(inputs["input_ids"].numel())
        return compute_loss(model, inputs, *rest, **named)

    trainer.compute_loss = counting
    trainer.train()
    passes = len(tokens) // args.steps
    peak = held_bytes()  # before held-out rows
    print(
        json.dumps(
            {
                "tokens_per_second": sum(map(int, tokens[WARM_UP * passes :])) / sum(times.seconds[WARM_UP:]),
                "padding_fraction": 1 - sum(map(int, tokens)) / sum(padded),
                "peak_memory_bytes": peak,
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "heldout_loss": heldout_loss(trainer.model, args.heldout) if args.heldout else None,
            }
        )
    )


if __name__ == "__main__":
    main()
