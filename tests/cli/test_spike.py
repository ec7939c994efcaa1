"""A loss that jumps and stays ends the run where that is asked for."""

import json
from pathlib import Path

import pytest

from sftcli.training.checkpoint.names import list_checkpoints, step_of

EASY, HARD = 96, 8


@pytest.fixture
def flags(sft, tiny_model: Path) -> list[str]:
    """Flags of a training whose last steps, by its curriculum, are on rows unlike all before."""
    easy = [{"question": "Heads?", "answer": f"{n * 37 % 32:05b}", "level": 0} for n in range(EASY)]
    hard = [
        {"question": f"Why {n}?", "answer": "".join(chr(33 + n * k % 90) for k in range(9, 40)), "level": 1}
        for n in range(1, HARD + 1)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy + hard), encoding="utf-8")
    sets = ("data.heldout_fraction=0", "training.batch_size=1", "training.epochs=1", "data.order=score",
            "data.score_column=level", "training.learning_rate=1e-2", "training.schedule=constant",
            "checkpoint.every_steps=24")  # fmt: skip
    return [
        "--data",
        "rows.jsonl",
        "--model",
        str(tiny_model),
        *(part for one in sets for part in ("--set", one)),
    ]


def test_loss_that_stays_high_ends_the_run_with_4_saved_and_with_the_way_back(sft, flags):
    code, out, err = sft("train", *flags, "--run", "one", "--set", "training.on_spike=stop")
    text = " ".join(err.split())
    assert (code, out) == (4, ""), err
    assert f"the loss spiked at step {EASY + 1}" in text
    assert f"stopped after step {EASY + 5} and saved" in text
    assert f"sft resume one --checkpoint {EASY} --set training.learning_rate=" in text
    assert [step_of(path) for path in list_checkpoints(Path("runs/one/checkpoints"))][-1] == EASY + 5
    assert not Path("runs/one/final").exists()
    assert sft("resume", "one")[0] == 0  # who wants to goes on
