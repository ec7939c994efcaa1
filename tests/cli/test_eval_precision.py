"""``sft eval --precision``: another one gives other numbers, which do not stand on the page of the run."""

import json
from pathlib import Path

from tests.cli.conftest import short_training


def test_scores_in_bfloat16_are_others_and_are_not_kept(sft, tiny_model, rows, tmp_path):
    assert (
        sft("train", "--data", rows, *short_training(tiny_model, tmp_path), "--run", "one", "--quiet")[0] == 0
    )
    asked = ("eval", "one", "--no-base", "--max-rows", "1", "--json", "--precision")
    code, out, err = sft(*asked, "bf16")
    assert code == 0, err
    assert not [path for path in Path("runs/one").iterdir() if "eval" in path.name]
    narrow, wide = json.loads(out)["tuned"]["loss"], json.loads(sft(*asked, "fp32")[1])["tuned"]["loss"]
    assert narrow != wide
    assert abs(narrow - wide) < 0.05
    assert [path for path in Path("runs/one").iterdir() if "eval" in path.name]
