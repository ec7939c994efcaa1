"""From held-out rows to a file of answers that may go out: ``sft eval`` finds the cut, ``generate --min-confidence`` uses it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.config.schema.run import SamplingSettings
from sftcli.errors import OutputError
from sftcli.events import NeverStop, unheard
from sftcli.services.generate.file import run_file_generation
from sftcli.services.generate.gate import Gate
from sftcli.services.generate.prompt_file import read_prompts
from sftcli.services.generate.request import GenerateRequest
from tests.cli.conftest import short_training

ASKED = 30


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """Train until one answer is known by heart; 120 rows are held out."""
    place = tmp_path_factory.mktemp("trained")
    rows = place / "rows.jsonl"
    lines = [{"question": f"What is {number}?", "answer": "A number."} for number in range(240)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    longer = ["--max-steps", "30", "--set", "data.heldout_fraction=0.5"]
    done = CliRunner().invoke(
        app, ["train", "--data", str(rows), "--run", "one", *short_training(tiny_model, place), *longer]
    )
    assert done.exit_code == 0, done.stderr
    scored = CliRunner().invoke(app, ["eval", str(place / "runs/one"), "--no-base"])
    assert scored.exit_code == 0, scored.stderr
    return place / "runs/one"


@pytest.fixture
def evaluated(trained, sft, tmp_path) -> Path:
    assert sft is not None  # it has moved to this folder
    return Path(shutil.copytree(trained, tmp_path / "runs/one"))


@pytest.fixture
def run(evaluated) -> Path:
    (evaluated / "eval.json").unlink()
    return evaluated


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(sft, *more: object) -> tuple[int, str, str]:
    prompts = Path("prompts.jsonl")
    asked = [{"prompt": f"What is {number}?", "id": number} for number in range(ASKED - 10)]
    asked += [{"prompt": "word " * (number + 1), "id": number} for number in range(ASKED - 10, ASKED)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return sft(
        "generate", "--file", prompts, "--out", "sure.jsonl", "--rest", "unsure.jsonl", *more,
    )  # fmt: skip


def test_the_cut_of_eval_decides_which_answers_go_out(run, sft):
    code, out, err = sft("eval", "one", "--no-base")
    assert code == 0, err
    assert "wrong at most (95%)" in out
    assert "sft generate --file rows.jsonl --out sure.jsonl --rest unsure.jsonl --min-confidence auto:" in err
    measured = json.loads((run / "eval.json").read_text(encoding="utf-8"))["confidence"]
    (cut,) = [one for one in measured["cuts"] if one["wrong_at_most"] == 0.05]
    assert (measured["rows"], measured["model"], measured["precision"]) == (120, "final", "fp32")
    page = (run / "report.html").read_text(encoding="utf-8")
    table = page.partition("<h3>Which answers can go out unread</h3>")[2].partition("</table>")[0]
    shown = [line.split() for line in out.partition("sure at")[2].splitlines()[1:] if "%" in line]
    assert shown
    assert [re.sub("<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]] == shown
    assert sft("export", "one", "--to", "hf", "--out", "exported")[0] == 0
    strictest = min(measured["cuts"], key=lambda one: (one["confidence"] is None, one["wrong_at_most"]))
    card = Path("exported/README.md").read_text(encoding="utf-8")
    assert (
        f"At a confidence of {strictest['confidence']:.5f} or more, {strictest['answered']} of 120 (" in card
    )
    assert f"at most {strictest['wrong_at_most']:.0%} of them wrong (95% certainty" in card

    code, out, err = ask(sft, "--min-confidence", "auto")
    assert code == 0, err
    assert out == "sure.jsonl\n"
    sure, unsure = lines_of(Path("sure.jsonl")), lines_of(Path("unsure.jsonl"))
    assert f"{len(sure)} of {ASKED}" in err
    assert (
        f"at most 5% of the answers that go out are wrong ({measured['measure']}), with 95% certainty"
        in " ".join(err.split())
    )
    assert sorted(row["id"] for row in [*sure, *unsure]) == list(range(ASKED))
    assert sure
    assert all(row["finish"] == "stop" and row["confidence"] >= cut["confidence"] for row in sure)
    assert not any(row["finish"] == "stop" and row["confidence"] >= cut["confidence"] for row in unsure)


def test_a_named_confidence_divides_the_same_answers(run, sft):
    assert run.is_dir()
    code, _, err = ask(sft, "--min-confidence", "0", "--max-new-tokens", "8")
    assert code == 0, err
    assert err.count("using ") == 1  # the model that nobody named
    ended = lines_of(Path("sure.jsonl"))
    assert all(row["finish"] == "stop" for row in ended)
    middle = sorted(row["confidence"] for row in ended)[len(ended) // 2]
    for name in ("sure.jsonl", "unsure.jsonl"):
        Path(name).rename(f"all-{name}")
    code, _, err = ask(sft, "--min-confidence", f"{middle!r}", "--max-new-tokens", "8")
    assert code == 0, err
    assert lines_of(Path("sure.jsonl")) == [row for row in ended if row["confidence"] >= middle]
    assert len(lines_of(Path("sure.jsonl"))) + len(lines_of(Path("unsure.jsonl"))) == ASKED


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--min-confidence", "auto"], 2, "one has no evaluation with confidences"),
        (["--min-confidence", "95%"], 2, "expected auto, auto:SHARE or a number from 0 to 1"),
        (["--min-confidence", "auto:0.05", "--samples", "2"], 2, "needs one answer a row"),
        (["--min-confidence", "0.5", "--rest", "here/../sure.jsonl"], 2, "--rest and --out are one file"),
        (["--min-confidence", "0.5", "--rest", ".sure.jsonl.partial"], 2, "--rest and --out are one file"),
        ([], 2, "--min-confidence and --rest go together"),
    ],
)
def test_what_cannot_be_promised_is_refused(more, code, message, run, sft):
    assert run.is_dir()
    found, _, err = ask(sft, *more)
    assert (found, message in err) == (code, True), err
    assert not Path("sure.jsonl").exists()


def edit(run: Path, change) -> None:
    evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    change(evaluation)
    (run / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")


def test_a_promise_is_bound_to_the_answers_that_eval_made(evaluated, sft):
    others = (
        ("--temperature", "0.5"), ("--precision", "bf16"), ("--repetition-penalty", "1.2"), ("--stop", "num"),
        ("--max-new-tokens", "2"), ("--max-new-tokens", "200"),
    )  # fmt: skip
    for flag, value in others:
        code, _, err = ask(sft, "--min-confidence", "auto", flag, value)
        assert (code, f"{flag} changes them" in err) == (2, True), err
    edit(evaluated, lambda found: found["confidence"]["cuts"][2].update(confidence=None))
    code, _, err = ask(sft, "--min-confidence", "auto")
    assert (code, "no cut keeps wrong answers at 5% or less over 120 held-out rows" in err) == (2, True), err


def said(err: str) -> str:
    return " ".join(err.split()).partition("too few answers to tell which can go out unread: ")[2]


def test_too_few_answers_name_what_makes_them_enough(run, sft):
    code, _, err = sft("eval", "one", "--no-base", "--max-rows", "20")
    assert code == 0
    assert said(err).startswith("20, and 50 are needed; to answer more: --max-rows 50 verdict: ")
    few = "".join(
        json.dumps({"question": f"How much is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(30)
    )
    Path("test.jsonl").write_text(few, encoding="utf-8")
    for flags, rows, more in (
        ((), 30, "name more rows with --data"),
        (("--max-rows", "20"), 20, "name more rows with --data, then --max-rows 50"),
    ):
        code, _, err = sft("eval", run, "--no-base", "--data", "test.jsonl", *flags)
        assert code == 0
        assert said(err).startswith(f"{rows}, and 50 are needed; {more}")
        assert "verdict" not in err  # that of the training is about other rows
        assert "30 held-out" in err
        assert "0 train" not in err
        assert "0 tokens" not in err


def test_page_and_card_say_nothing_of_cuts_where_there_are_none(run, sft):
    assert sft("eval", "one", "--no-base", "--max-rows", "20")[0] == 0
    assert json.loads((run / "eval.json").read_text(encoding="utf-8"))["confidence"]["cuts"] == []
    assert sft("export", "one", "--to", "hf", "--out", "exported")[0] == 0
    assert "can go out unread" not in (run / "report.html").read_text(encoding="utf-8")
    assert "At a confidence of" not in Path("exported/README.md").read_text(encoding="utf-8")


def test_a_promise_ends_with_the_model_that_was_evaluated(evaluated, sft):
    weights = evaluated / "final/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, err = ask(sft, "--min-confidence", "auto")
    assert (code, "final has changed since it was evaluated" in err) == (78, True), err
    weights.write_bytes(whole)  # as a copy is, at another time
    code, _, err = ask(sft, "--min-confidence", "auto")
    assert code == 0, err


def test_a_damaged_or_older_evaluation_promises_nothing(evaluated, sft):
    whole = (evaluated / "eval.json").read_bytes()
    for part in ("model", "model_hash", "cuts", "precision", "rows", "measure"):
        for change in (
            lambda kept, part=part: kept.pop(part),
            lambda kept, part=part: kept.update({part: [{}]}),
        ):
            edit(evaluated, lambda found, change=change: change(found["confidence"]))
            code, _, err = ask(sft, "--min-confidence", "auto")
            assert (code in (2, 65, 78), "bug" in err, Path("sure.jsonl").exists()) == (True, False, False), (
                err
            )
            (evaluated / "eval.json").write_bytes(whole)


def test_answers_end_where_the_evaluation_ended_them(evaluated, sft):
    most = json.loads((evaluated / "eval.json").read_text(encoding="utf-8"))["tuned"]["most_answer_tokens"]
    edit(evaluated, lambda found: found["tuned"].update(most_answer_tokens=2))  # the answers have three
    code, _, err = ask(sft, "--min-confidence", "auto")
    assert (code, most > 2, "answers were cut after 2 tokens" in " ".join(err.split())) == (0, True, True), (
        err
    )
    assert lines_of(Path("sure.jsonl")) == []
    assert {row["finish"] for row in lines_of(Path("unsure.jsonl"))} == {"length"}


def test_rows_that_another_command_keeps_back_are_not_overwritten(run):
    Path("prompts.txt").write_text("What is 1?\n", encoding="utf-8")
    rest, theirs = Path("unsure.jsonl"), '{"line": 1, "answer": "of another command"}\n'
    request = GenerateRequest(
        prompt="", sampling=SamplingSettings(), root=run.parent, precision="fp32", checkpoint="one"
    )
    asked = read_prompts(Path("prompts.txt"), system="")
    gate = Gate(min_confidence=1, rest=rest)

    def write_meanwhile(_event: object) -> None:
        rest.write_text(theirs, encoding="utf-8")

    with pytest.raises(OutputError, match=r"unsure\.jsonl was written meanwhile, with other rows"):
        run_file_generation(request, asked, Path("sure.jsonl"), write_meanwhile, NeverStop(), gate)
    assert rest.read_text(encoding="utf-8") == theirs
    rest.unlink()
    done = run_file_generation(request, asked, Path("sure.jsonl"), unheard, NeverStop(), gate)
    assert (done.kept, done.answered, done.unsure) == (1, 0, 1)


def test_a_pattern_says_nothing_about_right_answers(run, sft):
    assert sft("eval", "one", "--no-base", "--check", "regex:.")[0] == 0
    kept = json.loads((run / "eval.json").read_text(encoding="utf-8"))["confidence"]
    assert kept["measure"] == "exact match"


def test_text_where_no_tool_is_to_be_called_is_right_if_it_is_the_expected_one(evaluated, sft):
    call = json.dumps({"name": "count", "arguments": {}})
    answers = (
        [call] * 10 + ["A number."] * 45 + ["A letter."] * 45
    )  # nine of ten call nothing, as the model does
    lines = [{"question": f"What is {number}?", "answer": answer} for number, answer in enumerate(answers)]
    Path("mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, err = sft("eval", evaluated, "--no-base", "--data", "mixed.jsonl", "--json")
    assert code == 0, err
    found = json.loads(out)["confidence"]
    assert (found["measure"], found["rows"]) == ("tool", 100)
    assert [cut["confidence"] for cut in found["cuts"]] == [None] * 5
