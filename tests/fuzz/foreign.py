"""Files of others: models and rows."""

import json
from pathlib import Path

from tests.fuzz.targets import Target
from tests.support.runs import write_rows
from tests.support.tiny_model import build_tiny_model


def make_model_and_rows(folder: Path) -> None:
    """A tiny model in ``model``, and rows in ``rows.jsonl``."""
    build_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n", encoding="utf-8")


_TRAIN = "train --data rows.jsonl --model model --max-steps 2 --batch-size 4 --run fuzzed --set training.precision=fp32"
_USE = (
    "generate Hi -m model --max-new-tokens 3",
    "export model --to hf --out out",
    "eval model --data rows.jsonl --no-base --max-rows 2",
    f"{_TRAIN} -q",
)

FOREIGN = (
    Target(name="config.json", make=make_model_and_rows, file="model/config.json", commands=_USE),
    Target(name="tokenizer.json", make=make_model_and_rows, file="model/tokenizer.json", commands=_USE),
    Target(name="safetensors", make=make_model_and_rows, file="model/model.safetensors", commands=_USE),
    Target(
        name="rows.jsonl",
        make=make_model_and_rows,
        file="rows.jsonl",
        commands=("prepare rows.jsonl --model model", f"{_TRAIN} -q"),
    ),
)
