"""Models from checkpoints in several parts: each part has to be the one that was saved there."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sftcli.training.checkpoint.format import MODEL, write_part, write_rest
from sftcli.training.random_streams import capture_rng
from sftcli.training.state import Part, TrainingSnapshot, TrainState
from tests.cli.conftest import short_training, write_sums

SECOND = "model-00002-of-00002.safetensors"


def write_checkpoint(folder: Path, model: Path, step: int) -> Path:
    """Write a checkpoint in two parts, whose weights are those of ``model`` times ``step``."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: step * tensor for name, tensor in load_file(model / MODEL).items()}
    snapshots = [
        TrainingSnapshot(
            state=TrainState(step=step), weights=dict(sorted(tensors.items())[number::2]), optimizer={}, rng=capture_rng(),
            part=Part(number=number, of=2),
        )
        for number in (0, 1)
    ]  # fmt: skip
    files = {}
    for snapshot in snapshots:
        files |= write_part(folder, snapshot, weights_name=MODEL)
    write_rest(folder, snapshots[0], files, fingerprints={})
    return folder


@pytest.mark.parametrize("command", ["generate", "eval", "export", "train"])
def test_a_part_of_another_step_is_no_part_of_the_model(sft, tiny_model, tmp_path, command):
    one, other = (write_checkpoint(tmp_path / f"step-{step}", tiny_model, step) for step in (1, 2))
    rows = write_sums(tmp_path / "rows.jsonl")
    arguments = {
        "generate": ["generate", "Hi", "--checkpoint", one, "--max-new-tokens", "2"],
        "eval": ["eval", one, "--data", rows, "--max-rows", "2"],
        "export": ["export", one, "--to", "hf", "--out", "out"],
        "train": ["train", "--data", rows, *short_training(one, tmp_path)],
    }[command]
    code, _, err = sft(*arguments)
    assert code == 0, err
    shutil.copy(other / SECOND, one / SECOND)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    code, _, err = sft(*arguments)
    assert (code, f"{SECOND} was changed after it was saved" in " ".join(err.split())) == (65, True), err
