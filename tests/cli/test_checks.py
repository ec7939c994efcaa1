"""Checks on the command line: found, limited, kept with the run, on its page and its card."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import short_training


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A folder with a run on rows whose answers are objects with two keys."""
    from sftcli.cli import app

    place = tmp_path_factory.mktemp("trained")
    rows = [
        {"prompt": f"Order {number}", "completion": json.dumps({"city": f"City {number % 7}", "n": number})}
        for number in range(60)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SFT_CACHE_DIR", str(place / "cache"))
        flags = short_training(tiny_model, place)
        patch.setattr(
            "sys.argv",
            [
                "sft",
                "train",
                "--data",
                "rows.jsonl",
                "--run",
                "one",
                *flags,
                "--set",
                "data.heldout_fraction=0.4",
            ],
        )
        with pytest.raises(SystemExit) as end:
            app.main()
        assert not end.value.code
    return place


@pytest.fixture
def evaluate(sft, trained, monkeypatch):
    """Run ``sft eval one`` where the run is; return exit code, stdout and stderr."""

    def run(*more):
        monkeypatch.chdir(trained)
        monkeypatch.setenv("SFT_CACHE_DIR", str(trained / "cache"))
        return sft("eval", "one", *more)

    return run


def test_the_check_that_fits_is_told_kept_and_shown(evaluate, sft, trained):
    code, out, err = evaluate()
    assert code == 0, err
    assert "check: fields (2 keys) - all 24 expected answers are JSON objects with the same keys" in err
    kept = json.loads((trained / "runs/one/eval.json").read_text(encoding="utf-8"))
    (check,) = kept["checks"]
    assert [one["name"] for one in check["measures"]] == ["fields", "fields.city", "fields.n"]
    assert {one["rows"] for one in check["measures"]} == {kept["tuned"]["answered"]}
    for one in check["measures"]:
        part = one["name"].partition(".")[2]
        scores = [row["tuned"]["parts"][part] if part else row["tuned"]["score"] for row in kept["graded"]]
        assert (one["tuned_right"], one["tuned"]) == (sum(scores), pytest.approx(sum(scores) / 24))
        assert one["difference"]["low"] <= one["difference"]["value"] <= one["difference"]["high"]
    assert [row["row"] for row in kept["graded"]] != []
    assert check["measures"][0]["tuned_right"] == kept["tuned"]["matched"]
    page = (trained / "runs/one/report.html").read_text(encoding="utf-8")
    assert sft("export", "one", "--to", "hf", "--out", "out")[0] == 0
    card = Path("out/README.md").read_text(encoding="utf-8")
    right = f"{check['measures'][0]['tuned_right']} of 24"
    assert f"Check `fields (2 keys)`: {right}" in card
    assert "<h3>Check: fields (2 keys)</h3>" in page
    for text in (out, page):
        assert all(one["name"] in text for one in check["measures"])
    assert f"fields: {right}" in err


def test_limits_of_checks_end_with_three(evaluate):
    quick = ("--no-base", "--max-rows", "3")
    code, _, err = evaluate(*quick, "--fail-under", "fields.city=1.1", "--fail-under", "fields=1.1")
    assert code == 3
    assert "fields.city is " in err
    assert "fields is " in err
    code, out, _ = evaluate(*quick, "--fail-under", "fields.n=-1", "--json")
    assert (code, json.loads(out)["checks"][0]["name"]) == (0, "fields")


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (("--fail-under", "fields.ctiy=1"), 2, "did you mean 'fields.city'?"),
        (("--fail-under", "label=1"), 65, "the check 'label' was not found for these rows"),
        (("--check", "number"), 0, "check: number - all 24 expected answers hold a number"),
        (
            ("--check", "tool"),
            65,
            "--check tool does not fit these rows: 0 of 24 expected answers call a tool",
        ),
        (("--check", "none"), 0, ""),
        (("--check", "json,regex:^{", "--fail-under", "regex=2"), 3, "regex is "),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(evaluate, more, code, told):
    found, _, err = evaluate("--no-base", "--max-rows", "24", *more)
    assert found == code
    assert told in err
    assert (" parameters, on " in err) == (code in (0, 3))
    assert ("check: " in err) == (code in (0, 3) and "none" not in more)


def test_a_function_sees_the_row_of_the_file(evaluate, trained):
    (trained / "mine.py").write_text(
        "import json\n\ndef same_city(answer, expected, row):\n"
        "    assert json.loads(expected) == json.loads(row['completion'])\n    return {'row': row['prompt'][:5] == 'Order'}\n",
        encoding="utf-8",
    )
    limits = ("--fail-under", "same_city.row=1", "--fail-under", "same_city=1")
    code, _, err = evaluate("--no-base", "--max-rows", "3", "--check", "mine.py:same_city", *limits)
    assert "check: same_city (mine.py:same_city) - named" in err
    assert code == 3  # the parts are right, and the answers of a random model do not end
    assert "same_city.row is" not in err


def test_a_function_that_fails_does_so_before_a_model_is_loaded(evaluate, trained):
    (trained / "bad.py").write_text("def grade(answer, expected):\n    return True\n", encoding="utf-8")
    code, _, err = evaluate("--check", "bad.py:grade")
    assert (code, " parameters, on " in err) == (65, False)
    assert "bad.py:grade failed on rows.jsonl:" in err
    assert "TypeError" in err
