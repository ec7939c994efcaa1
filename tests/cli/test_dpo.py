"""The next stage of the recipe opens what this one leaves: TRL takes a DPO step from the final folder of a run."""

from pathlib import Path

import pytest
import torch

from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def test_trl_takes_a_dpo_step_from_the_final_folder(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl, then make dpo")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model")
    final = train(settings_of(tmp_path, model, "run.name=first"), StopAtStep(99)).final
    policy = AutoModelForCausalLM.from_pretrained(final)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    pairs = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {n} plus {n}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {2 * n}."}],
                "rejected": [{"role": "assistant", "content": "I do not know."}],
            }
            for n in range(8)
        ]
    )
    trainer = trl.DPOTrainer(
        model=policy,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3,
            report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, bf16=False, disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(final),
    )  # fmt: skip
    assert trainer.train().global_step == 1
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are still equal
    assert any(not torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
