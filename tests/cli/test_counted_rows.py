"""Beside every number stands how many rows it is of: in the terminal, the JSON, the page and the card."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import write_sums


@pytest.fixture
def evaluated(sft, flags, tmp_path):
    """Train with ``held`` rows held out of sixty, answer ``asked`` of them; return the JSON and what the terminal shows."""

    def run(held: int, asked: int) -> tuple[dict, str]:
        rows = write_sums(tmp_path / "rows.jsonl")
        share = f"data.heldout_fraction={held / 60}"
        assert sft("train", "--data", rows, "--run", "one", *flags, "--set", share)[0] == 0
        command = ("eval", "one", "--runs", tmp_path / "runs", "--max-rows", asked)
        code, out, err = sft(*command)
        assert code == 0, err
        return json.loads((tmp_path / "runs/one/eval.json").read_text(encoding="utf-8")), out + err

    return run


def column(text: str, label: str) -> str:
    """Return the last cell of the row that starts with ``label``."""
    line = next(line for line in text.splitlines() if label in line)
    return re.findall(r"[\d,.-]+", re.sub(r"<[^>]+>", " ", line))[-1]


def test_a_number_stands_beside_the_rows_that_it_is_of(evaluated, sft, tmp_path):
    report, shown = evaluated(held=30, asked=10)
    sft("export", "one", "--to", "hf", "--out", "out", "--runs", tmp_path / "runs")
    page = (tmp_path / "runs/one/report.html").read_text(encoding="utf-8")
    card = Path("out/README.md").read_text(encoding="utf-8")
    for text in (page, card, shown):
        for label in ("held-out loss (nats/token)", "perplexity", "bits per byte", "token accuracy"):
            assert column(text, label) == "30"
        for label in ("exact match", "answer length", "answers that loop", "memorized"):
            assert column(text, label) == "10"
    for model in ("tuned", "base"):
        assert (report[model]["rows"], report[model]["answered"], report[model]["json_rows"]) == (30, 10, 0)
        assert sum(report[model]["source_rows"].values()) == 30
    assert (report["loss_difference"]["rows"], report["match_difference"]["rows"]) == (30, 10)
    assert report["match_difference"]["low"] is report["match_difference"]["high"] is None
    assert report["loss_difference"]["low"] <= report["loss_difference"]["value"]
    logged = (tmp_path / "runs/one/events.jsonl").read_text(encoding="utf-8").splitlines()
    heldout = [event for event in map(json.loads, logged) if event["event"] == "HeldoutDone"]
    assert {event["rows"] for event in heldout} == {30}


def test_three_rows_give_no_interval_and_no_three_decimals(evaluated, sft, tmp_path):
    report, shown = evaluated(held=3, asked=200)
    assert report["loss_difference"]["low"] is report["tuned"]["loss_standard_error"] is None
    _, about, _ = sft("show", "one", "--runs", tmp_path / "runs")
    page = (tmp_path / "runs/one/report.html").read_text(encoding="utf-8")
    sft("export", "one", "--to", "hf", "--out", "out", "--runs", tmp_path / "runs")
    card = Path("out/README.md").read_text(encoding="utf-8")
    held_out = next(line for line in about.splitlines() if line.startswith("held-out loss"))
    scored = page[page.index("Scores on held-out rows") : page.index("<h3>Samples")]
    table = card[card.index("## Scores") : card.index("## Settings")]
    facts = next(line for line in page.splitlines() if "<th>held-out loss</th>" in line)
    verdict = next(line for line in shown.splitlines() if line.startswith("verdict"))
    for text in (shown.replace(verdict, ""), held_out, scored, table, facts):
        assert "loss" in text
        assert not re.search(r"\d\.\d\d", text)
    assert "3 rows are too few" in shown
    assert "3 rows are too few" in scored
    assert "3 held-out rows are too few to say" in verdict
    command = ("eval", "one", "--runs", tmp_path / "runs", "--no-base", "--fail-above")
    code, _, err = sft(*command, "loss_standard_error=1")
    assert code == 65
    assert "loss_standard_error was not measured on these rows" in err


def test_answers_that_are_cut_are_counted_and_marked_wherever_they_are_shown(evaluated, sft, tmp_path):
    report, shown = evaluated(held=30, asked=8)  # as many as are kept as samples
    page = (tmp_path / "runs/one/report.html").read_text(encoding="utf-8")
    for model in ("base", "tuned"):
        score, marked = report[model], [sample[f"{model}_cut"] for sample in report["samples"]]
        assert (sum(marked), len(marked)) == (score["cut"], score["answered"])
        assert score["cut_fraction"] == score["cut"] / 8
        assert len(re.findall(rf"{model}: <span[^>]*>wrong</span>, cut short", page)) == score["cut"]
        assert score["mean_answer_tokens"] <= score["most_answer_tokens"]
        assert score["cut"] + score["matched"] <= 8
    cut = report["base"]["cut"]
    assert cut  # a model of random weights does not end its answers
    most = report["base"]["most_answer_tokens"]
    told = f"cut at {most} tokens, a few more than the longest expected answer: {cut} of 8 answers of "
    assert told in " ".join(shown.split())
    assert column(shown, "answers cut short") == column(page, "answers cut short") == "8"
    wrong = [miss for miss in report["misses"][:3] if miss["cut"]]
    assert sum(line.endswith(" (cut)") for line in shown.splitlines()) == len(wrong)
    code, _, err = sft("eval", "one", "--runs", tmp_path / "runs", "--no-base", "--max-rows", 8,
                       "--fail-above", "cut_fraction=-1")  # fmt: skip
    assert (code, "cut_fraction" in err) == (3, True)


@pytest.mark.parametrize("kind", ["no rows", "text", "rows"])
def test_an_evaluation_is_offered_where_there_are_rows_for_it(sft, flags, tmp_path, kind):
    rows = write_sums(tmp_path / "rows.jsonl")
    more = {"no rows": ["--set", "data.heldout_fraction=0"], "text": ["--as-text"], "rows": []}[kind]
    if kind == "text":
        texts = [{"text": f"Words of text number {number}, and more of them."} for number in range(60)]
        rows.write_text("".join(json.dumps(text) + "\n" for text in texts))
    code, _, err = sft("train", "--data", rows, "--run", "one", *flags, *more)
    assert code == 0, err
    _, _, about = sft("show", "one", "--runs", tmp_path / "runs")
    page = (tmp_path / "runs/one/report.html").read_text(encoding="utf-8")
    is_offered = kind == "rows"
    for text in (err, about, page):
        assert ("sft eval" in text, "next:" in text or text is page) == (is_offered, True)
    assert sft("eval", "one", "--runs", tmp_path / "runs", "--no-base")[0] == (0 if is_offered else 65)
