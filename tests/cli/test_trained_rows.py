"""``sft eval RUN --data FILE`` tells how many rows of FILE were trained on, and says so where it cannot know."""

import json
import shutil
from pathlib import Path

import pytest


def row(number: int, answer: str | None = None) -> dict[str, str]:
    return {"question": f"What is {number} plus {number}?", "answer": answer or f"It is {2 * number}."}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture
def scored(sft, flags, tmp_path):
    """Train on all of 30 rows but those held out; return what evaluates a file with the run."""
    rows = write(tmp_path / "rows.jsonl", [row(number) for number in range(30)])
    assert sft("train", "--data", rows, "--run", "one", *flags)[0] == 0
    shown = json.loads(sft("prepare", rows, *_prepare_flags(flags), "--show", "30", "--json")[1])["shown"]
    trained = [int(one["origin"].rpartition(":")[2]) - 1 for one in shown]

    def run(*arguments: object) -> tuple[str, str]:
        command = ("eval", "one", "--runs", tmp_path / "runs", "--no-base", "--max-rows", "4", *arguments)
        code, out, err = sft(*command)
        assert code == 0, err
        return out, err

    return run, trained


def _prepare_flags(flags: list[str]) -> list[str]:
    return ["--model", flags[1], "--set", "data.heldout_fraction=0.2"]


def test_rows_and_prompts_that_were_trained_on_are_counted(scored, tmp_path):
    run, trained = scored
    held = next(number for number in range(30) if number not in trained)
    rows = [row(trained[0]), row(trained[1]), row(trained[2], "No idea."), row(held), row(500)]
    data = write(tmp_path / "test.jsonl", rows)
    out, _ = run("--data", data, "--json")
    report = json.loads(out)
    assert report["trained_on"] == {"rows": 5, "same_row": 2, "same_prompt": 3}
    assert report["tuned"]["memorized_fraction"] == 0  # short answers; it was looked for
    _, err = run("--data", data)
    assert "warning: 2 of these 5 rows were trained on, and 1 more has a prompt that was" in err
    assert "5 named rows" in err
    _, err = run()
    assert "6 held-out rows" in err
    assert "none of these 6 rows was trained on" in err
    assert "None of these 6 rows was trained on" in (tmp_path / "runs/one/report.html").read_text(
        encoding="utf-8"
    )


def test_where_the_trained_rows_are_gone_nothing_is_claimed(scored, tmp_path):
    run, trained = scored
    shutil.rmtree(tmp_path / "cache" / "prepared")
    data = write(tmp_path / "test.jsonl", [row(trained[0])])
    out, err = run("--data", data)
    assert "how many of these rows were trained on is unknown" in err
    assert "prepare them again: sft eval one" in err
    assert "memorized" not in out
    report = json.loads(run("--data", data, "--json")[0])
    assert report["trained_on"] is report["tuned"]["memorized_fraction"] is None
    assert report["tuned"]["longest_copied_tokens"] is None
    run()
    assert json.loads(run("--data", data, "--json")[0])["trained_on"]["same_row"] == 1
