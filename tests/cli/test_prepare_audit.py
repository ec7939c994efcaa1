"""What `sft prepare` says about rows, when it fails on them, and what it leaves for others."""

import json
import re
from pathlib import Path

import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.events import NeverStop, Progressed, Session
from sftcli.figures import counted
from sftcli.services.prepare.prepare import prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.support.recording import RecordingSink
from tests.support.runs import write_rows

GOOD = [(f"What is {n} plus {n}, and how do you know?", f"It is {2 * n}.") for n in range(20)]


@pytest.fixture
def prepare(sft, tiny_model):
    """Prepare pairs of question and answer; return exit code, stdout and stderr on one line."""

    def run(rows: list[tuple[str, str]], *flags: object, name: str = "rows.jsonl") -> tuple[int, str, str]:
        lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        default = ("--model", tiny_model, "--set", "data.heldout_fraction=0")
        code, out, err = sft("prepare", name, *default, *flags)
        return code, out, " ".join(err.split())

    return run


def audit_of(out: str) -> dict[str, object]:
    return json.loads(out)["audit"]["train"]


def test_the_audit_counts_what_needs_a_look(prepare):
    rows = [
        *GOOD,
        GOOD[3],
        ("A caf\ufffd?", "Yes."),
        ("A cafÃ©?", "Yes."),
        ("Bell\x07", "No."),
        ("Empty?", ""),
    ]
    code, out, _ = prepare(rows, "--json")
    audit = audit_of(out)
    assert code == 0
    assert (audit["duplicate_rows"], audit["trouble_rows"]) == (1, 3)
    assert audit["duplicates"]["exact"] == ["rows.jsonl:21 like rows.jsonl:4"]
    assert audit["flags"] == {"unreadable": 1, "misread": 1, "control-character": 1}
    assert audit["rejected"] == {"empty-answer": 1}
    assert audit["sources"]["rows.jsonl"]["kept"] == 24


def test_share_of_replayed_rows_is_told_to_be_for_training_alone(prepare):
    code, _, err = prepare(GOOD, "--set", "data.replay=0.2")
    assert code == 0
    assert "data.replay takes effect in training alone" in err


def test_turns_behind_the_last_answer_are_counted_and_said(sft, tiny_model):
    asked = {"role": "user", "content": "And then?"}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = [{"messages": [*talk, asked, asked]}, {"messages": [*talk, asked, talk[1]]}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ("--model", tiny_model, "--set", "data.heldout_fraction=0", "--show", "2", "--json")
    _, out, _ = sft("prepare", "rows.jsonl", *flags)
    audit, shown = audit_of(out), json.loads(out)["shown"]
    assert (audit["flags"], audit["flagged_rows"]) == (
        {"trailing-turns": 1},
        {"trailing-turns": ["rows.jsonl:1"]},
    )
    assert [row["flags"] for row in shown] == [["trailing-turns"], []]
    assert "in 1 row the turns after the last answer are dropped" in audit["notes"][-1]


def test_a_person_sees_the_audit_with_a_histogram(prepare):
    code, out, err = prepare([*GOOD, GOOD[3]])
    assert code == 0
    assert Path(out.strip()).is_dir()
    assert "duplicates 1, such as rows.jsonl:21 like rows.jsonl:4" in err
    assert "up to 32" in err
    assert err.endswith(
        "kept in the cache, for trainings with the same rows and settings:"
    )  # the path follows


def test_strict_passes_rows_that_are_good(prepare):
    assert prepare(GOOD, "--strict")[0] == 0


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (("Empty?", ""), (), "1 of 21 rows are rejected (none may be), such as rows.jsonl:21: turn 2"),
        (GOOD[3], (), "1 of 21 rows are equal to an earlier row (none may be), such as rows.jsonl:21 like"),
        (
            ("Bell\x07", "No."),
            (),
            "1 of 21 rows are with encoding trouble (none may be), such as rows.jsonl:21",
        ),
        (
            ("Long?", "It is so. " * 60),
            ("--overlong", "truncate", "--max-tokens", "64"),
            "1 of 21 rows are cut (none may be), such as rows.jsonl:21",
        ),
    ],
)
def test_strict_names_what_is_wrong(prepare, row, flags, message):
    code, out, err = prepare([*GOOD, row], "--strict", *flags)
    assert code == 3
    assert message in err
    assert not out  # no place of rows that will not be trained on
    assert "kept in the cache" not in err


def test_a_limit_allows_a_share_with_and_without_strict(prepare):
    rows = [*GOOD, ("Empty?", "")]
    assert prepare(rows, "--strict", "--set", "data.max_rejected_fraction=0.05")[0] == 0
    code, _, err = prepare(rows, "--set", "data.max_rejected_fraction=0.01")
    assert code == 3
    assert "1 of 21 rows are rejected (at most 1.00% may be)" in err


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        ([GOOD[0], ("A?", ""), ("B?", ""), ("C?", "")], ()),
        ([*GOOD[:13], *[(f"{n}?", "") for n in range(16)]], ()),
        ([*GOOD, GOOD[3], ("Empty?", "")], ("--strict",)),
        ([*GOOD, ("Empty?", "")], ("--set", "data.max_rejected_fraction=0.01")),
    ],
    ids=["3 of 4", "16 of 29", "two limits", "a limit of its own"],
)
def test_the_limit_that_an_error_names_is_enough(prepare, rows, flags):
    code, _, err = prepare(rows, *flags)
    assert code in (3, 65)
    assert prepare(rows, *flags, *err.rpartition("raise the limit: ")[2].split())[0] == 0


def test_no_limit_is_named_where_no_row_would_be_left(prepare):
    assert "raise the limit" not in prepare([("A?", "")])[2]


def test_strict_fails_on_cached_rows_too_and_json_is_one_object(prepare):
    rows = [*GOOD, GOOD[0]]
    assert prepare(rows)[0] == 0
    code, out, _ = prepare(rows, "--strict", "--json")
    assert code == 3
    assert json.loads(out)["ok"] is False


def test_strict_fails_on_a_prompt_on_both_sides(prepare):
    Path("held.jsonl").write_text(json.dumps({"question": GOOD[2][0], "answer": "Other."}), encoding="utf-8")
    code, _, err = prepare(GOOD, "--heldout", "held.jsonl", "--strict")
    assert code == 3
    assert "1 held-out rows have a prompt that is also trained on" in err


def test_strict_stops_a_training_before_it_starts(prepare, sft, tiny_model):
    prepare([*GOOD, GOOD[0]])
    code, _, err = sft("train", "--data", "rows.jsonl", "--model", tiny_model, "--strict", "--max-steps", "1")
    assert code == 3
    assert "equal to an earlier row" in " ".join(err.split())


def test_shown_rows_are_described_for_scripts(prepare):
    _, out, _ = prepare(GOOD, "--show", "2", "--json")
    first, second = json.loads(out)["shown"]
    assert (first["origin"], second["origin"]) == ("rows.jsonl:1", "rows.jsonl:2")
    assert first["num_tokens"] == sum(len(token["ids"]) for token in first["tokens"])
    assert first["num_trained"] == sum(len(token["ids"]) for token in first["tokens"] if token["trained"])
    stops = [token for token in first["tokens"] if token["is_stop"]]
    assert [token["text"] for token in stops] == ["<|im_end|>"]


def test_shown_rows_tell_trained_text_apart_without_color(prepare):
    _, out, _ = prepare(GOOD, "--show", "1")
    text, _folder = out.rsplit("\n", 2)[0], out.rsplit("\n", 2)[1]
    assert text.startswith("rows.jsonl:1  ")
    assert "[[It is 0.<|im_end|>■]]↵" in text


def test_rows_are_written_for_other_trainers(prepare, tiny_model):
    datasets = pytest.importorskip("datasets")
    code, out, _ = prepare(GOOD, "--out", "prepared", "--set", "data.heldout_fraction=0.2")
    assert (code, out.strip()) == (0, "prepared")
    loaded = datasets.load_dataset("prepared", cache_dir="hf")
    assert set(loaded) == {"train", "validation"}
    row = loaded["train"][0]
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    kept = [
        token
        for token, is_trained in zip(row["input_ids"], row["completion_mask"], strict=True)
        if is_trained
    ]
    assert kept == [label for label in row["labels"] if label != -100]
    assert kept
    assert row["origin"].startswith("rows.jsonl:")
    assert json.loads(Path("prepared/audit.json").read_text())["audit"]["train"]["kept"] == len(
        loaded["train"]
    )


def test_rows_are_not_written_over_others_nor_when_they_are_not_good_enough(prepare):
    Path("there").mkdir()
    assert prepare(GOOD, "--out", "there")[0] == 73
    assert prepare([*GOOD, GOOD[0]], "--strict", "--out", "new")[0] == 3
    assert not Path("new").exists()
    assert not list(Path("there").iterdir())


def test_rows_are_told_as_they_are_read_with_the_number_of_lines(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sftcli.services.prepare.pipeline.CHUNK_ROWS", 10)
    rows, sink = write_rows(tmp_path / "rows.jsonl"), RecordingSink()
    data = DataSettings(sources=(str(rows),))
    prepare_data(
        data, find_sources(data), model_folder=tiny_model, seed=0, session=Session(sink, NeverStop())
    )
    told = [(event.task.split()[0], event.done, event.total) for event in sink.of(Progressed)]
    assert told == [("preparing", done, 25) for done in (0, 10, 20, 25, 25)]


def test_few_held_out_rows_and_what_the_printed_folder_is_for_are_said(sft, rows, tiny_model):
    code, out, err = sft("prepare", rows, "--model", tiny_model, "--set", "data.heldout_fraction=0.05")
    assert code == 0
    assert re.search(
        r"warning: \d held-out rows? proves? little; to hold out more: --set data\.heldout_fraction=0\.", err
    )
    assert err.splitlines()[-1] == "kept in the cache, for trainings with the same rows and settings:"
    assert Path(out.strip()).is_dir()


def test_a_single_row_is_spoken_of_as_one(sft, tmp_path, tiny_model):
    (tmp_path / "bad.jsonl").write_text('{"messages": 1}\n')
    code, _, err = sft("prepare", "bad.jsonl", "--model", tiny_model)
    assert (code, "the only row was rejected" in err) == (65, True)
    assert counted(1, "held-out row") + counted(2000, " row") == "1 held-out row2,000  rows"


def test_a_name_of_other_trainers_in_a_section_is_named_in_ours(sft):
    code, _, err = sft("train", "--set", "training.lr=1")
    assert (code, "unknown key 'training.lr' (here it is training.learning_rate)" in err) == (2, True)
