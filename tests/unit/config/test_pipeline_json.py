"""The pipeline's JSON configuration gives the settings of its SFT stage and names what it leaves out."""

import json

import pytest

from sftcli.config.layers import Override
from sftcli.config.resolve import resolve
from sftcli.errors import UsageError

CONTENT = {
    "run_name": "local-full", "tokenizer_name": "tok", "sft_max_steps": 50, "sft_lr": 2e-5, "sft_batch_size": 8,
    "sft_micro_batch_size": 2, "sft_dataset": "rows.jsonl", "max_seq_len": 256, "save_every": 25, "eval_every": 5,
    "log_every": 3, "seed": 7, "mixed_precision": "bf16", "output_dir": "out", "d_model": 64, "dpo_lr": 1e-6,
    "pretrain_max_steps": 9,
}  # fmt: skip


def read(tmp_path, **changes):
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(CONTENT | changes), encoding="utf-8")
    model = [Override(key="model.name", value="pretrain.pt", origin="--model")]
    return resolve(preset=None, config_file=path, overrides=model, environ={})


def test_keys_of_the_stage_become_settings(tmp_path):
    settings = read(tmp_path).settings
    training = settings.training
    assert (training.max_steps, training.learning_rate, training.batch_size) == (50, 2e-5, 8)
    assert (training.micro_batch_size, training.eval_every_steps, training.log_every_steps) == (2, 5, 3)
    assert (training.seed, training.precision) == (7, "bf16")
    assert (settings.run.name, settings.run.root) == ("local-full", "out")
    assert (settings.data.sources, settings.data.max_tokens) == (("rows.jsonl",), 256)
    assert (settings.checkpoint.every_steps, settings.model.tokenizer) == (25, "tok")


def test_keys_of_other_stages_are_named_once(tmp_path):
    (notice,) = read(tmp_path).notices
    assert notice.endswith("ignored: dpo_lr, pretrain_max_steps")


def test_several_data_sets_win_over_the_one_among_them(tmp_path):
    assert read(tmp_path, sft_datasets=["rows.jsonl", "b"]).settings.data.sources == ("rows.jsonl", "b")


def test_float16_is_taken_as_such(tmp_path):
    assert read(tmp_path, mixed_precision="fp16").settings.training.precision == "fp16"


def test_contradicting_data_sets_and_precisions_are_refused(tmp_path):
    for wrong in ({"sft_datasets": ["b"]}, {"mixed_precision": "fp8"}):
        with pytest.raises(UsageError, match=r"pipeline\.json"):
            read(tmp_path, **wrong)
