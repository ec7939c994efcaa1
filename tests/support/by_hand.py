"""A training whose steps take all rows, as this package makes it and as a loop of transformers and torch alone does."""

import json
from pathlib import Path

import torch
from torch.nn import functional

from sftcli.config.resolve import Resolved
from sftcli.events import Ending
from tests.support.runs import StopAtStep, numbers_of, settings_of, train
from tests.support.tiny_model import build_tiny_model

STEPS, RATE = 4, 3e-3
EPSILON = 1e-4  # else the first step is the sign of the gradient, of tiny ones too


def pairs() -> list[tuple[str, str]]:
    return [(f"What <q> is {n} plus {n}?", f"It <tool> is {'so ' * (n % 3)}{2 * n}.") for n in range(12)]


def build_place(folder: Path, *, tie: bool) -> Path:
    """Write a model and rows to ``folder``."""
    build_tiny_model(folder / "model", tie=tie)
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs()]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def plain_settings(place: Path, *changes: str) -> Resolved:
    return settings_of(
        place, place / "model", "training.batch_size=12", "training.micro_batch_size=5", f"training.max_steps={STEPS}",
        "training.schedule=constant", "training.warmup_steps=0", f"training.learning_rate={RATE}",
        f"training.epsilon={EPSILON}", "training.precision=fp32", "training.eval_every_steps=0",
        "data.heldout_fraction=0", "checkpoint.every_steps=2", *changes,
    )  # fmt: skip


def plain_run(place: Path, *changes: str) -> Path:
    outcome = train(plain_settings(place, *changes), StopAtStep(STEPS + 1))
    assert outcome.ending is Ending.FINISHED
    return Path(outcome.path)


def losses_of(run: Path) -> list[float]:
    return [event["loss"] for event in numbers_of(run) if event["event"] == "StepDone"]


def by_hand(model, tokenizer) -> list[float]:
    """Train the parameters of ``model`` that want a gradient, row by row; return the losses of the steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.01},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=EPSILON)
    losses = []
    model.train()
    model.get_input_embeddings().padding_idx = None  # it is the stop token, which has a gradient here
    for _ in range(STEPS):
        total, count = torch.zeros(()), 0
        for question, answer in pairs():
            turns = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            begin = tokenizer(prompt, add_special_tokens=False).input_ids
            end = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
            logits = model(torch.tensor([begin + end])).logits[0, len(begin) - 1 : -1]
            total = total + functional.cross_entropy(logits, torch.tensor(end), reduction="sum")
            count += len(end)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    return losses
