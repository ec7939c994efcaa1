"""What becomes of rows that are too long, and what is said about it."""

import json
from pathlib import Path


def write_long(name: str = "long.jsonl") -> str:
    """Write 20 rows, of which the third has an answer of over a hundred tokens."""
    answers = ["It is."] * 20
    answers[2] = "It is, and here is why, at length. " * 12
    lines = [json.dumps({"question": f"Is {n} a number?", "answer": a}) for n, a in enumerate(answers)]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def flags(tiny_model: Path, policy: str) -> tuple[object, ...]:
    return (
        "--model",
        tiny_model,
        "--set",
        "data.heldout_fraction=0",
        "--max-tokens",
        "64",
        "--overlong",
        policy,
    )


def audit_of(sft, tiny_model: Path, policy: str) -> dict[str, object]:
    code, out, _ = sft("prepare", write_long(), *flags(tiny_model, policy), "--json")
    assert code == 0
    return json.loads(out)["audit"]["train"]


def test_long_rows_are_dropped_and_counted(sft, tiny_model):
    audit = audit_of(sft, tiny_model, "drop")
    assert (audit["kept"], audit["cut_rows"], audit["rejected"]) == (19, 0, {"too-long": 1})


def test_long_rows_are_cut_and_what_was_cut_is_counted(sft, tiny_model):
    audit = audit_of(sft, tiny_model, "truncate")
    assert (audit["kept"], audit["cut_rows"], audit["rejected"]) == (20, 1, {})
    assert audit["flags"] == {"cut-answer": 1}
    assert audit["cut_tokens"] == audit["longest_tokens"] - 64
    assert "from 1 row the end of an answer is cut off, with its stop token" in audit["notes"]
    assert f"1 row cut to 64 tokens; {audit['longest_tokens']} would keep 99 %" in audit["notes"][-1]


def test_long_rows_are_an_error_that_names_them_and_keeps_nothing(sft, tiny_model):
    code, out, err = sft("prepare", write_long(), *flags(tiny_model, "error"))
    assert (code, out) == (65, "")
    text = " ".join(err.split())
    assert "1 of 20 rows are longer than 64 tokens: long.jsonl:3:" in text
    assert "--max-tokens" in text
    assert not list(Path("cache/prepared").glob("*"))


def test_another_policy_is_a_usage_error(sft, tiny_model):
    code, _, err = sft("prepare", write_long(), *flags(tiny_model, "shorten"))
    assert code == 2
    assert "truncate" in err


def test_held_out_answer_that_was_cut_has_loss_and_is_compared_with_no_answer(sft, rows, tiny_model):
    short = ("--model", tiny_model, "--max-tokens", "64", "--overlong", "truncate", "--max-steps", "1")
    assert sft("train", "--data", rows, "--heldout", write_long(), *short, "--run", "one")[0] == 0
    code, _, err = sft("eval", "one", "--no-base")
    assert code == 0, err
    report = json.loads(Path("runs/one/eval.json").read_text(encoding="utf-8"))
    assert (report["rows"], report["cut_rows"], report["tuned"]["answered"]) == (20, 1, 19)
    assert "held-out rows with a truncated answer: 1" in err
