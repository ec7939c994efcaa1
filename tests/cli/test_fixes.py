"""``--fixes``: applied while rows are prepared, with the sources untouched and the outcome told."""

import json
from pathlib import Path

import pytest

from sftcli.data.prepared.store import open_prepared
from tests.cli.conftest import short_training, write_sums


@pytest.fixture
def hashes(sft, rows, tiny_model) -> list[str]:
    """The hash of each row, by its line."""
    del rows
    code, out, _ = sft(
        "prepare", "rows.jsonl", "--model", tiny_model, "--json", "--set", "data.heldout_fraction=0"
    )
    assert code == 0
    table = open_prepared(Path(json.loads(out)["folder"])).train
    found = {table[row].origin.line: table[row].row for row in range(len(table))}
    return [found[line] for line in range(1, 61)]


def write_fixes(*fixes: dict[str, str]) -> None:
    Path("fixes.jsonl").write_text("".join(json.dumps(fix) + "\n" for fix in fixes), encoding="utf-8")


def prepared(sft, tiny_model, *flags: str):
    code, out, err = sft("prepare", "rows.jsonl", "--model", tiny_model, "--json", *flags)
    assert code == 0, err
    return json.loads(out)


def answers_of(folder: str) -> dict[int, tuple[int, ...]]:
    dataset = open_prepared(Path(folder))
    return {
        table[row].origin.line: tuple(table[row].input_ids[table[row].loss_mask].tolist())
        for table in (dataset.train, dataset.heldout)
        for row in range(len(table))
    }


def test_rows_are_left_out_and_answers_replaced_and_the_sources_stay_as_they_are(
    sft, rows, tiny_model, hashes
):
    before, content = answers_of(prepared(sft, tiny_model)["folder"]), rows.read_bytes()
    write_fixes(
        {"row": hashes[4], "fix": "leave-out", "place": "rows.jsonl:5"},
        {"row": hashes[5], "fix": "replace", "answer": "It is 10.", "place": "rows.jsonl:6"},
        {"row": hashes[6], "fix": "keep"},
        {"row": "0" * 32, "fix": "leave-out", "place": "rows.jsonl:99"},
    )
    code, _, err = sft("prepare", "rows.jsonl", "--model", tiny_model, "--fixes", "fixes.jsonl")
    assert code == 0
    told = "fixes.jsonl: 1 row left out, 1 answer replaced, 1 kept, 1 no longer found (rows.jsonl changed)"
    assert told in " ".join(err.split())
    outcome = prepared(sft, tiny_model, "--fixes", "fixes.jsonl")
    assert outcome["cached"] is True
    assert outcome["audit"]["train"]["excluded"] == {"fix": 1}
    after = answers_of(outcome["folder"])
    # Line 6 has that answer already; it gets another one below.
    assert after == {line: answer for line, answer in before.items() if line != 5}
    write_fixes({"row": hashes[5], "fix": "replace", "answer": "It is 22."})
    after = answers_of(prepared(sft, tiny_model, "--fixes", "fixes.jsonl")["folder"])
    assert after[6] == before[12]
    assert {line: after[line] for line in after if line != 6} == {
        line: before[line] for line in before if line != 6
    }
    assert rows.read_bytes() == content


def test_rows_that_have_moved_are_found_and_a_row_that_was_fixed_keeps_its_name(
    sft, rows, tiny_model, hashes
):
    write_fixes(
        {"row": hashes[0], "fix": "leave-out", "place": "rows.jsonl:1"},
        {"row": hashes[59], "fix": "replace", "answer": "none", "place": "rows.jsonl:60"},
    )
    rows.write_text(
        "".join(reversed(rows.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8"
    )
    outcome = prepared(sft, tiny_model, "--fixes", "fixes.jsonl", "--set", "data.heldout_fraction=0")
    fixes = outcome["fixes"]
    assert (fixes["left_out"], fixes["replaced"], fixes["missing"]) == (1, 1, 0)
    table = open_prepared(Path(outcome["folder"])).train
    assert [table[row].row for row in range(len(table))] == hashes[:0:-1]


def test_prepared_twice_it_is_the_same_and_other_fixes_are_other_rows(sft, rows, tiny_model, hashes):
    write_fixes({"row": hashes[0], "fix": "leave-out"}, {"row": hashes[1], "fix": "replace", "answer": "no"})
    first = prepared(sft, tiny_model, "--fixes", "fixes.jsonl")
    Path("fixes.jsonl").rename("again.jsonl")
    assert prepared(sft, tiny_model, "--fixes", "again.jsonl") == first | {"cached": True}
    write_fixes({"row": hashes[0], "fix": "leave-out"}, {"row": hashes[1], "fix": "replace", "answer": "yes"})
    second = prepared(sft, tiny_model, "--fixes", "fixes.jsonl")
    assert second["folder"] != first["folder"]
    assert prepared(sft, tiny_model)["folder"] not in {first["folder"], second["folder"]}


def test_a_malformed_line_is_refused_before_anything_is_loaded(sft, rows, flags):
    write_fixes({"row": "0" * 32, "fix": "leave out"})
    for command in (
        ["prepare", "rows.jsonl", "--model", flags[1]],
        ["train", "--data", "rows.jsonl", *flags],
    ):
        code, _, err = sft(*command, "--fixes", "fixes.jsonl")
        assert code == 65
        assert "fixes.jsonl:1" in err
    assert not Path("runs").exists()


def test_a_run_says_what_it_was_fixed_by_and_is_resumed_with_the_same_fixes_alone(
    sft, rows, tiny_model, hashes
):
    write_fixes({"row": hashes[4], "fix": "leave-out", "place": "rows.jsonl:5"})
    training = [
        *short_training(tiny_model, Path()),
        "--run",
        "one",
        "--fixes",
        "fixes.jsonl",
        "--set",
        "checkpoint.every_steps=2",
    ]
    code, _, err = sft("train", "--data", "rows.jsonl", *training)
    assert code == 0, err
    rows_of_run = json.loads(Path("runs/one/data.json").read_text(encoding="utf-8"))
    assert rows_of_run["fixes"]["left_out"] == 1
    assert "1 row left out" in Path("runs/one/report.html").read_text(encoding="utf-8")
    assert "1 row left out" in Path("runs/one/training.log").read_text(encoding="utf-8")
    longer = ["resume", "one", "--max-steps", "6", "--allow-change", "training.max_steps"]
    write_fixes({"row": hashes[5], "fix": "leave-out"})
    code, _, err = sft(*longer)
    assert code == 78, err
    assert "does not match: data was" in err
    write_fixes({"row": hashes[4], "fix": "leave-out"})
    code, _, err = sft(*longer)
    assert code == 0, err


def test_an_evaluation_tells_that_the_fixes_are_others_and_counts_the_rows_that_were_trained_on(
    sft, rows, tiny_model, hashes
):
    write_fixes({"row": hashes[4], "fix": "leave-out"})
    training = [*short_training(tiny_model, Path()), "--run", "one", "--fixes", "fixes.jsonl"]
    assert sft("train", "--data", "rows.jsonl", *training)[0] == 0
    asked = ["eval", "one", "--no-base", "--check", "none", "--json"]
    code, out, err = sft(*asked)
    assert (code, json.loads(out)["trained_on"]["same_row"]) == (0, 0)
    assert "not those that one was trained on" not in err
    data = ["--set", "data.heldout_fraction=0.2", "--fixes", "fixes.jsonl"]
    trained = lines_of(open_prepared(Path(prepared(sft, tiny_model, *data)["folder"])).train)
    write_fixes(*({"row": row, "fix": "leave-out"} for row in hashes[10:]))
    held = lines_of(open_prepared(Path(prepared(sft, tiny_model, *data)["folder"])).heldout)
    code, out, err = sft(*asked)
    assert "the rows are not those that one was trained on" in " ".join(err.split())
    assert json.loads(out)["trained_on"]["same_row"] == len(held & trained) > 0


def lines_of(table) -> set[int]:
    return {line for _, line in table.origins()}


def test_a_row_that_is_kept_is_listed_no_more(sft, tiny_model, tmp_path):
    data = write_sums(tmp_path / "rows.jsonl")
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[7] = json.dumps({"question": "What is 7 plus 7?", "answer": "Это четырнадцать."})
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    training = ["train", "--data", "rows.jsonl", *short_training(tiny_model, Path())]
    assert sft(*training, "--run", "one")[0] == 0
    odd = next(row for row in ledger_of(sft, "one") if "script" in row["reasons"])
    assert odd["place"] == "rows.jsonl:8"
    write_fixes({"row": odd["row"], "fix": "keep"})
    assert sft(*training, "--run", "two", "--fixes", "fixes.jsonl")[0] == 0
    (kept,) = [row for row in ledger_of(sft, "two") if row["row"] == odd["row"]]
    assert (kept["reasons"], kept["is_kept"]) == ({}, True)
    (fix,) = json.loads(Path("runs/two/rows.json").read_text(encoding="utf-8"))["fixes"]
    assert (fix["row"], fix["fix"]) == (odd["row"], "keep")  # for the file that its page writes


def ledger_of(sft, run: str) -> list[dict]:
    code, out, err = sft("report", run, "--rows", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]["rows"]
    return [row | {"place": f"{row['source']}:{row['line']}"} for row in rows]
