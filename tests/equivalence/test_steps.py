"""Losses of whole runs are those of a loop that knows transformers and torch alone, for models that are made in odd ways."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from sftcli.errors import UsageError
from sftcli.events import NeverStop, Notice, Session, StepDone
from sftcli.services.train.start.inputs import find_inputs
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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
          "mamba_chunk_size": 8}  # fmt: skip
CONFIGS |= {
    name: AutoConfig.for_model(name, **SMALL, **own)
    for name, own in {
        "gpt_oss": EXPERTS | {
            "head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gemma4_text": {
            "head_dim": 8, "global_head_dim": 8, "sliding_window": WINDOW, "vocab_size_per_layer_input": 514,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "falcon_h1": STATES | {"head_dim": 8},
        "nemotron_h": EXPERTS | {
            "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
            "layers_block_type": ["mamba", "attention"],
        },
        "qwen3_next": EXPERTS | {
            "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    }.items()
}  # fmt: skip
UNPACKED = {"gemma2, without sdpa", "gpt_oss", "falcon_h1", "nemotron_h", "qwen3_next"}
HYBRID = {"falcon_h1", "nemotron_h", "qwen3_next"}
COEFFICIENT = 0.5
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
        losses, told = run(settings(tmp_path, folder, f"training.packing={packing}", f"run.name={packing}"))
        assert losses == pytest.approx(expected, abs=1e-4), packing
        is_packed = any(text.startswith("rows are packed") for text in told)
        assert is_packed == (packing == "auto" and name not in UNPACKED)
        assert any("with a state run in their slow form" in text for text in told) == (name in HYBRID)
    assert expected[0] - expected[-1] > 0.01  # else the optimizer would not show


def balanced_loop(folder: Path, resolved) -> list[tuple[float, float]]:
    """The same with the load-balancing loss of transformers, all rows in one padded batch; return both losses of each step."""
    prepared = find_inputs(resolved.settings, Session(lambda event: None, NeverStop())).prepared
    rows = [prepared.dataset.train[index] for index in range(ROWS)]
    width = max(len(row.input_ids) for row in rows)
    ids, mask = torch.full((ROWS, width), 2), torch.zeros((ROWS, width), dtype=torch.int64)
    labels = torch.full((ROWS, width), -100)
    for place, row in enumerate(rows):
        size = len(row.input_ids)
        ids[place, :size] = torch.from_numpy(row.input_ids.astype("int64"))
        mask[place, :size] = 1
        labels[place, :size] = torch.where(torch.from_numpy(row.loss_mask), ids[place, :size], -100)
    labels[:, 0] = -100
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, router_aux_loss_coef=COEFFICIENT
    )
    model.get_input_embeddings().padding_idx = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        model.train()
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aux = outputs.aux_loss.item()
        found.append((outputs.loss.item() - COEFFICIENT * aux, aux))
    return found


@pytest.mark.parametrize("name", ["qwen3 with experts", "gpt_oss"])
def test_load_balancing_is_that_of_transformers_over_whole_steps_packed_and_not(tmp_path: Path, name: str):
    folder = build(tmp_path / "model", CONFIGS[name])
    sets = f"training.router_aux_loss={COEFFICIENT}"
    expected = balanced_loop(folder, settings(tmp_path, folder, sets))
    plain = plain_loop(folder, settings(tmp_path, folder))
    assert expected[-1][0] != pytest.approx(plain[-1], abs=1e-3)  # else it would not show
    for packing in ("auto", "off"):
        flag = StopAtStep(STEPS + 1)
        train(settings(tmp_path, folder, sets, f"training.packing={packing}", f"run.name={packing}"), flag)
        steps = [event for event in flag.events if isinstance(event, StepDone)]
        assert all(step.micro_batches > 1 for step in steps)
        found = [(step.loss, step.router_aux_loss) for step in steps]
        assert [value for pair in found for value in pair] == pytest.approx(
            [value for pair in expected for value in pair], abs=1e-4
        ), packing
        assert [step.objective for step in steps] == pytest.approx(
            [loss + COEFFICIENT * aux for loss, aux in expected], abs=1e-4
        )


def test_a_model_without_a_load_balancing_loss_is_refused_by_name(tmp_path: Path):
    folder = build(tmp_path / "model", CONFIGS["smollm3"])
    with pytest.raises(UsageError, match="SmolLM3ForCausalLM has no load-balancing loss"):
        run(settings(tmp_path, folder, "training.router_aux_loss=0.01"))


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
