"""What is computed with transformers and torch alone, to compare with: losses, gradients, answers, logits, tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from sftcli.data.batches.order import EpochOrder

IGNORED = -100


def train_plainly(folder: str, prepared: str, batch_size: int, rates: Sequence[float]) -> dict[str, Any]:
    """Train with AdamW as it is documented, each row alone; return losses, gradient norms and held-out losses."""
    model = _load(folder)
    rows, heldout = (
        pq.read_table(f"{prepared}/{name}.parquet").to_pylist() for name in ("train", "validation")
    )
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.01},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    order = EpochOrder(len(rows), seed=[0])
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "heldout": [_mean_nll(model, heldout)]}
    for step, rate in enumerate(rates):
        model.train()
        mine = [rows[index] for index in order.rows(step * batch_size, (step + 1) * batch_size)]
        tokens, total = sum(map(_count, mine)), 0.0
        for row in mine:
            nll = _nll(model, row)
            (nll / tokens).backward()
            total += nll.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        found["loss"].append(total / tokens)
        found["grad_norm"].append(norm.item())
    found["heldout"].append(_mean_nll(model, heldout))
    return found


def answer_plainly(folder: str, prompts: Sequence[str], count: int) -> list[str]:
    """Return greedy answers, one prompt at a time."""
    model, tokenizer = _load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
        )
        answer = made[0, ids.shape[1] :].tolist()
        if answer and answer[-1] in (ends if isinstance(ends, list) else [ends]):
            answer.pop()
        answers.append(tokenizer.decode(answer))
    return answers


@torch.no_grad()
def logits_apart(adapter: str, merged: str) -> float:
    """Return how far the logits of a ``merged`` folder are from those that peft gets from the ``adapter``."""
    ids = torch.arange(100, 140)[None]
    is_whole = PeftConfig.from_pretrained(adapter).auto_mapping is not None
    opener = AutoPeftModel if is_whole else AutoPeftModelForCausalLM
    theirs = opener.from_pretrained(adapter, dtype=torch.float32).eval()
    one, other = (model(input_ids=ids, use_cache=False).logits for model in (theirs, _load(merged).eval()))
    return float((one - other).norm() / one.norm())


def tensors_apart(one: Path, other: Path, *, names_only: bool = False) -> list[str]:
    """Return the names of tensors that two folders do not both have, with equal numbers unless ``names_only``."""
    left, right = (_tensors(folder) for folder in (one, other))
    apart = left.keys() ^ right.keys()
    if not names_only:
        apart |= {name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])}
    return sorted(apart)


def _load(folder: str) -> PreTrainedModel:
    """Load a model of text, or of text and images, as the class that its configuration names."""
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    if isinstance(model, transformers.Llama4ForConditionalGeneration):
        # The whole one ends with an error in transformers 5.24: it asks the language model for images.
        model.language_model.generation_config = model.generation_config
        model = model.language_model
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None  # whose row would not train
    return model


def _count(row: dict[str, Any]) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


def _nll(model: PreTrainedModel, row: dict[str, Any]) -> torch.Tensor:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def _mean_nll(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    model.eval()
    return sum(_nll(model, row).item() for row in rows) / sum(map(_count, rows))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
