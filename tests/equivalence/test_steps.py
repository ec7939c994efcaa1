"""Losses of whole runs are those of a loop that knows transformers and torch alone, for models that are made in odd ways."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from sftcli.events import NeverStop, Notice, Session, StepDone
from sftcli.services.train.inputs import find_inputs
from tests.support.architectures import SMALL
from tests.support.runs import StopAtStep, settings_of, train
from tests.support.tiny_tokenizer import build_tiny_tokenizer

STEPS, ROWS, WINDOW, RATE = 3, 8, 24, 1e-3
CONFIGS: dict[str, PretrainedConfig] = {
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0], layer_types=None),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2, without sdpa": Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "qwen3 with experts": Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
DROPOUT = SeedOssConfig(**SMALL, head_dim=8, residual_dropout=0.5, attention_dropout=0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))


def build(folder: Path, config: PretrainedConfig) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return build_tiny_tokenizer(folder)


def settings(folder: Path, model: Path, *changes: str):
    rows = [
        {"question": f"What is {n}?", "answer": " ".join(str(n * k) for k in range(2, 9 + 2 * n))}
        for n in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    every = (
        f"training.batch_size={ROWS}", "training.micro_batch_size=3", "training.epochs=1", f"training.max_steps={STEPS}",
        f"training.learning_rate={RATE}", "training.schedule=constant", "training.warmup_steps=0", "training.weight_decay=0",
        "training.max_grad_norm=1e9", "training.train_embeddings=true", "data.heldout_fraction=0", "training.eval_every_steps=0",
        "checkpoint.every_steps=0",
    )  # fmt: skip
    return settings_of(folder, model, "training.precision=fp32", *every, *changes)


def run(resolved) -> tuple[list[float], list[str]]:
    flag = StopAtStep(STEPS + 1)
    train(resolved, flag)
    losses = [event.loss for event in flag.events if isinstance(event, StepDone)]
    return losses, [event.text for event in flag.events if isinstance(event, Notice)]


def plain_loop(folder: Path, resolved) -> list[float]:
    """Each row by itself through the model of transformers, and AdamW of torch; every step sees all rows."""
    prepared = find_inputs(resolved.settings, Session(lambda event: None, NeverStop())).prepared
    rows = [prepared.dataset.train[index] for index in range(ROWS)]
    assert max(len(row.input_ids) for row in rows) > WINDOW + 8
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # the padding token is the stop token too, and learned
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    count, losses = sum(int(row.loss_mask[1:].sum()) for row in rows), []
    for _ in range(STEPS):
        model.train()
        total = 0.0
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype("int64"))
            logits = model(input_ids=ids[None]).logits[0, :-1]
            nll = functional.cross_entropy(logits, ids[1:], reduction="none")
            loss = (nll * torch.from_numpy(row.loss_mask[1:])).sum() / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_three_steps_are_those_of_a_plain_loop_packed_and_not(tmp_path: Path, name: str):
    folder = build(tmp_path / "model", CONFIGS[name])
    expected = plain_loop(folder, settings(tmp_path, folder))
    for packing in ("auto", "off"):
        losses, _ = run(settings(tmp_path, folder, f"training.packing={packing}", f"run.name={packing}"))
        assert losses == pytest.approx(expected, abs=1e-4), packing
    assert expected[0] - expected[-1] > 0.01  # else the optimizer would not show


def test_dropout_of_sums_is_there_in_training(tmp_path: Path):
    folder = build(tmp_path / "model", DROPOUT)
    without = build(
        tmp_path / "plain", SeedOssConfig(**SMALL, head_dim=8, residual_dropout=0.0, attention_dropout=0.0)
    )
    losses, told = run(settings(tmp_path, folder, "run.name=with"))
    assert losses[0] != pytest.approx(run(settings(tmp_path, without, "run.name=without"))[0][0], abs=1e-3)
    assert any(
        "SeedOssDecoderLayer" in text and "using the transformers implementation" in text for text in told
    )
