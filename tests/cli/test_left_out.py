"""Rows that `sft train` leaves out are said, with what keeps them, and following that keeps them."""

import json
import re
from pathlib import Path

GOOD = '{"question": "Is 1 a number?", "answer": "yes"}\n'
LONG = json.dumps({"question": "Is it?", "answer": "yes " * 60}) + "\n"
EMPTY = '{"question": "Is 1 a number?", "answer": ""}\n'


def trained(sft, model, *flags: object) -> tuple[dict, str]:
    asked = ("train", "--data", "rows.jsonl", "--model", model, "--max-steps", 1, "--resume", "auto")
    code, out, err = sft(*asked, "--set", "data.heldout_fraction=0", *flags, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_rows_left_out_are_said_with_what_keeps_them(sft, tiny_model):
    Path("rows.jsonl").write_text(GOOD * 30 + LONG * 2 + EMPTY, "utf-8")
    told, err = trained(sft, tiny_model, "--max-tokens", 60, "--run", "a")
    text = str(told["left_out"]["remedy"])
    assert told["left_out"] | {"remedy": ""} == {
        "rows": 3,
        "of": 33,
        "reasons": {"too-long": 2, "empty-answer": 1},
        "examples": told["left_out"]["examples"],
        "remedy": "",
    }
    assert told["left_out"]["examples"]["too-long"].startswith("rows.jsonl:31: ")
    line = next(line for line in err.splitlines() if "left out" in line)
    assert line.startswith("warning: 3 of 33 rows are left out (too-long 2, rows.jsonl:31: ")
    assert line.endswith(text)
    (flag,) = re.findall(r"--max-tokens \d+", text)
    told, _ = trained(sft, tiny_model, *flag.split(), "--run", "b")
    assert told["left_out"]["reasons"] == {"empty-answer": 1}
    Path("rows.jsonl").write_text(GOOD * 30 + LONG * 2, "utf-8")
    told, err = trained(sft, tiny_model, *flag.split(), "--run", "c")
    assert told["left_out"] is None
    assert "left out" not in err
