"""``sft diff``, ``sft eval --against`` and ``--junit``: planted edits are listed exactly, and nothing else."""

import json
import os
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.services.report.evaluation import Evaluation
from sftcli.services.report.score import Score
from tests.cli.conftest import short_training
from tests.support.runs import copied_here

RATE = ("--set", "training.learning_rate=5e-3", "--set", "data.strip_stop_text=true")


def row(number: int, answer: str | None = None) -> dict[str, str]:
    return {"question": f"What is {number} plus {number}?", "answer": answer or f"It is {2 * number}."}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    """Two short runs: the second on other rows, with another learning rate. Row 1 of the first file is row 2 of the second."""
    folder = tmp_path_factory.mktemp("two")
    rows = [row(number) for number in range(40)]
    edited = [row(900), *rows]
    edited[5] = row(4, "It is eight.")
    edited[9] = {**rows[8], "question": "What is eight and eight?"}
    del edited[20]  # row 20 of the first file
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        for name, lines, changes in (("one", rows, ()), ("two", edited, RATE)):
            write(folder / "rows.jsonl", lines)
            flags = short_training(tiny_model, Path())
            arguments = ["train", "--data", "rows.jsonl", "--run", name, *flags, *changes]
            assert CliRunner().invoke(app, arguments).exit_code == 0
    return folder


@pytest.fixture
def two_runs(sft, trained, tmp_path, monkeypatch) -> Path:
    return copied_here(trained, tmp_path, monkeypatch) / "runs"


def answers_of(run: Path) -> dict:
    return json.loads((run / "eval.json").read_text(encoding="utf-8"))


def plant(run: Path, passed: list[bool]) -> list[str]:
    """Let the answers of a run be right as ``passed`` says; return where their rows are."""
    found = answers_of(run)
    for one, is_right in zip(found["answers"], passed, strict=True):
        one["passed"] = {"exact match": is_right}
    (run / "eval.json").write_text(json.dumps(found), encoding="utf-8")
    return [one["origin"] for one in found["answers"]]


def test_planted_edits_of_rows_and_settings_are_listed_exactly(sft, two_runs):
    code, out, _ = sft("diff", "one", "two", "--json")
    found = json.loads(out)
    assert code == 0
    rows = found["rows"]
    assert rows["added"] == ["rows.jsonl:1", "rows.jsonl:10"]
    assert rows["gone"] == ["rows.jsonl:9", "rows.jsonl:20"]
    assert rows["changed"] == [{"before": "rows.jsonl:5", "after": "rows.jsonl:6", "part": "answer"}]
    assert (rows["moved"], rows["same"]) == ([], 37)
    named = [(one["key"], one["before"], one["after"], one["before_from"]) for one in found["settings"]]
    assert named == [
        ("data.strip_stop_text", False, True, "default"),
        ("training.learning_rate", 0.01, 0.005, "--set"),
    ]
    assert found["facts"] == []
    assert found["answers"] is None
    assert len(found["notes"]) == 2  # neither was scored


def test_run_differs_in_nothing_from_itself(sft, two_runs):
    found = json.loads(sft("diff", "one", "one", "--json")[1])
    assert found["rows"] | {"same": 0} == {"same": 0, "added": [], "gone": [], "changed": [], "moved": []}
    assert (found["settings"], found["facts"], found["heldout"]["same_rows"]) == ([], [], True)


def test_versions_that_differ_are_named(sft, two_runs):
    about = json.loads((two_runs / "one" / "run.json").read_text(encoding="utf-8"))
    about["torch"], about["packages"]["tokenizers"] = "1.0", "0.1"
    (two_runs / "one" / "run.json").write_text(json.dumps(about), encoding="utf-8")
    facts = json.loads(sft("diff", "one", "two", "--json")[1])["facts"]
    assert [(one["name"], one["before"]) for one in facts] == [("torch", "1.0"), ("tokenizers", "0.1")]


def test_rows_that_are_gone_from_the_cache_are_not_guessed(sft, two_runs):
    for store in Path(os.environ["SFT_CACHE_DIR"]).glob("prepared/*/manifest.json"):
        store.unlink()
    code, out, err = sft("diff", "one", "two")
    assert code == 0
    assert "rows:" not in out
    assert "the rows of one are no longer prepared" in err


def test_answers_that_became_right_and_wrong_are_listed_exactly(sft, two_runs):
    for name in ("one", "two"):
        assert sft("eval", name, "--no-base", "--max-rows", "100", "--quiet")[0] == 0
    count = {name: len(answers_of(two_runs / name)["answers"]) for name in ("one", "two")}
    plant(two_runs / "one", [place < 3 for place in range(count["one"])])
    plant(two_runs / "two", [place == 1 or place >= 5 for place in range(count["two"])])
    first, second = (
        {
            one["row"]: (one["origin"], one["passed"]["exact match"])
            for one in answers_of(two_runs / name)["answers"]
        }
        for name in ("one", "two")
    )
    both = [key for key in second if key in first]
    (moved,) = json.loads(sft("diff", "one", "two", "--json")[1])["answers"]
    assert moved["rows"] == len(both)
    assert moved["became_right"] == [second[key][0] for key in both if second[key][1] > first[key][1]]
    assert moved["became_wrong"] == [second[key][0] for key in both if second[key][1] < first[key][1]]
    assert moved["became_right"]
    assert moved["became_wrong"]
    _, screen, err = sft("diff", "one", "two")
    assert (
        f"one answered {count['one']}, two {count['two']}, of which {len(both)} are the same"
        in " ".join(err.split())
    ) is (len(both) < max(count.values()))
    for origin in moved["became_wrong"][:5]:
        assert f"became wrong: {origin}" in screen


def test_a_pattern_is_compared_with_the_same_pattern_alone(sft, two_runs):
    asked = ("eval", "one", "--no-base", "--max-rows", "8", "--json")
    assert sft(*asked, "--check", "regex:.")[0] == 0
    for pattern, measures in (("x", ["exact match"]), (".", ["exact match", "regex:."])):
        _, out, _ = sft(*asked, "--against", "one", "--check", f"regex:{pattern}", "--precision", "bf16")
        assert [one["measure"] for one in json.loads(out)["against"]["answers"]] == measures


def test_worse_answers_end_with_3_and_fail_their_test_case(sft, two_runs):
    assert sft("eval", "one", "--no-base", "--max-rows", "100", "--quiet")[0] == 0
    kept = two_runs / "one" / "eval.json"
    same = ("eval", "one", "--no-base", "--max-rows", "100", "--against")
    code, out, err = sft(*same, kept, "--junit", "eval.xml", "--fail-above", "loss=0.001")
    assert code == 3
    assert "0 became right, 0 wrong" in err
    assert "worse than" not in err
    root = Xml.parse(Path("eval.xml")).getroot()
    failed = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    assert failed == {"loss"}
    names = [case.get("name") for case in root.iter("testcase")]
    assert len(names) == len(set(names)) == int(root.get("tests"))
    assert names[-2:] == [f"exact match against {kept}", f"number against {kept}"]
    earlier = Path("earlier.json")
    earlier.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
    found = json.loads(earlier.read_text(encoding="utf-8"))
    for one in found["answers"]:
        one["passed"] = {"exact match": True}
    earlier.write_text(json.dumps(found), encoding="utf-8")
    code, _, err = sft(*same, earlier, "--junit", "eval.xml")
    assert code == 3
    assert f"worse than {earlier}" in err
    root = Xml.parse(Path("eval.xml")).getroot()
    (failed,) = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed.get("name") == f"exact match against {earlier}"
    code, out, _ = sft("eval", "one", "--no-base", "--against", "one", "--max-rows", "100", "--json")
    assert code == 0
    assert json.loads(out)["against"]["answers"][0]["became_wrong"] == []


WHOLE = Evaluation(
    rows=1,
    tuned=Score(
        model="m", loss=1.0, response_tokens=1, bits_per_byte=1.0, token_accuracy=1.0, matched=1, answered=1,
        mean_answer_tokens=1.0, mean_expected_tokens=1.0, looping_fraction=0.0,
    ),
).to_json()  # fmt: skip


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, 66, "does not exist"),
        ("{}", 65, "old.json is damaged: rows is missing"),
        (WHOLE | {"answers": None}, 2, "did not keep which rows were answered right"),
        (WHOLE | {"answers": [{"row": 3}]}, 65, "old.json is damaged: answers[0].origin is missing"),
        (WHOLE | {"answers": []}, 65, "nothing to compare"),
    ],
)
def test_evaluation_that_cannot_be_compared_with_is_refused(
    sft, rows, tiny_model, tmp_path, content, code, said
):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "old.json").write_text(text, encoding="utf-8")
    ended, _, err = sft(
        "eval", tiny_model, "--data", rows, "--no-base", "--max-rows", "1", "--against", "old.json"
    )
    assert (ended, said in err) == (code, True), err
