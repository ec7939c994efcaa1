"""Rows that are left out on request, and rows written as messages."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.runs import write_rows as write_pairs

WORDS = [
    "ferry",
    "harbor",
    "evening",
    "bell",
    "river",
    "market",
    "bread",
    "window",
    "garden",
    "letter",
    "winter",
]


def write_rows(name: str, *rows: dict[str, object]) -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return name


def pair(number: int, **more: object) -> dict[str, object]:
    words = " ".join(
        f"{WORDS[(number * 7 + place * place) % 11]}{(number + place) % 13}" for place in range(40)
    )
    return {"prompt": f"{number} {words}", "completion": f"It is {number}.", **more}


@pytest.fixture
def prepare(sft, tiny_model):
    def run(*args: object, fraction: float = 0.0) -> tuple[int, dict[str, object], str]:
        flags = (
            "--model",
            tiny_model,
            "--max-tokens",
            4000,
            "--set",
            f"data.heldout_fraction={fraction}",
            "--json",
        )
        code, out, err = sft("prepare", *args, *flags)
        return code, json.loads(out), " ".join(err.split())

    return run


def rows_of(folder: str) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the ids and labels of all rows in a folder of Parquet files."""
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    return Counter(
        (tuple(ids), tuple(labels))
        for table in tables
        for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
    )


def test_conditions_leave_rows_out_and_are_counted(prepare):
    rows = write_rows("rows.jsonl", *[pair(n, quality=n % 5, meta={"lang": "en"}) for n in range(20)])
    code, told, _ = prepare(rows, "--where", "quality>=4", "--where", "meta.lang==en", "--strict")
    audit = told["audit"]["train"]
    assert (code, audit["rows"], audit["kept"], audit["excluded"]) == (0, 4, 4, {"where": 16})
    assert "16 rows left out by --where" in audit["notes"]
    code, told, _ = prepare(rows, "--where", "qualty>=4")
    assert code == 2
    assert "quality" in told["error"]["hint"]
    code, told, _ = prepare(rows, "--where", "quality=4")
    assert (code, "is no condition" in told["error"]["message"]) == (2, True)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_repeated_rows_are_left_out_and_counted(prepare, fraction):
    near = pair(3) | {"completion": "It is three."}
    rows = write_rows("rows.jsonl", *map(pair, range(12)), pair(3), pair(5), pair(5), near)
    _, told, _ = prepare(rows, fraction=fraction)
    counts = Counter[str]()
    for audit in told["audit"].values():
        counts.update({name: audit[name] for name in ("duplicate_rows", "near_duplicate_rows", "kept")})
    assert counts == {"duplicate_rows": 3, "near_duplicate_rows": 1, "kept": 16}
    flags = ("--duplicates", "drop", "--near-duplicates", "drop", "--strict")
    code, told, _ = prepare(rows, *flags, "--out", "clean", fraction=fraction)
    audits = told["audit"].values()
    assert code == 0
    assert sum(audit["kept"] for audit in audits) == sum(rows_of("clean").values()) == 12
    assert sum(sum(audit["excluded"].values()) for audit in audits) == 4
    assert all(audit["duplicate_rows"] == audit["near_duplicate_rows"] == 0 for audit in audits)
    named = [row for audit in audits for rows in audit["excluded_rows"].values() for row in rows]
    assert len(named) == 4
    assert all(" like rows.jsonl:" in row for row in named)


def test_held_out_rows_lose_nothing_to_training_rows(prepare):
    train = write_rows("train.jsonl", *map(pair, range(6)), pair(2))
    held = write_rows("held.jsonl", pair(1) | {"completion": "It is one."}, pair(8), pair(8))
    _, told, _ = prepare(train, "--heldout", held, "--duplicates", "drop", "--near-duplicates", "drop")
    audits = told["audit"]
    assert [audits[split]["kept"] for split in ("train", "heldout")] == [6, 2]
    assert audits["heldout"]["near_trained_rows"] == 1


def test_which_copy_stays_is_drawn_with_the_seed(prepare):
    rows = write_rows("rows.jsonl", *[pair(1, id=n) for n in range(4)], pair(2))
    left = set()
    for seed in range(8):
        flags = ("--duplicates", "drop", "--set", f"training.seed={seed}", "--show", 5)
        first, second = (prepare(rows, *flags)[1]["shown"] for _ in range(2))
        assert first == second
        left.add(first[0]["origin"])
    assert len(left) > 1


def test_stop_text_is_told_in_train_and_taken_away_on_request(sft, tiny_model, prepare):
    rows = write_rows("rows.jsonl", *[pair(n) | {"completion": f"It is {n}.</s>"} for n in range(12)])
    _, told, _ = prepare(rows, "--show", 1)
    assert told["audit"]["train"]["flags"]["stop-text"] == 12
    _, told, _ = prepare(rows, "--strip-stop-text", "--show", 1)
    assert told["audit"]["train"]["flags"] == {"stop-stripped": 12}
    assert "</s>" not in "".join(token["text"] for token in told["shown"][0]["tokens"])
    flags = ("--model", tiny_model, "--max-steps", 1, "--max-tokens", 4000)
    _, _, err = sft("train", "--data", rows, *flags)
    assert "12 rows an answer ends in the text of a stop token" in " ".join(err.split())
    _, _, err = sft("train", "--data", rows, *flags, "--strip-stop-text")
    assert "stop token" not in err


CHAT = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Brick.", "weight": 0}]
TALK = [*CHAT, {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "A pear."}]
PARTS = [{"type": "text", "text": "A wall? ", "loss": 0}, {"type": "text", "text": "A pear."}]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--train-on", "last"),
        ("--train-on", "each"),
        ("--overlong", "truncate", "--max-tokens", 150),
        ("--strip-stop-text", "--duplicates", "drop", "--near-duplicates", "drop"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_rows_written_as_messages_and_prepared_again_give_the_same_ids_and_masks(prepare, more):
    pairs = write_rows(
        "pairs.jsonl",
        *[pair(n, reasoning="So it is." if n % 3 else None) for n in range(30)],
        pair(4),
        pair(5) | {"completion": "Five.</s>"},
        pair(9, history=[["What?", "This."]]),
    )
    chats = write_rows(
        "chats.jsonl", {"messages": TALK}, {"messages": [CHAT[0], CHAT[1] | {"content": PARTS, "weight": 1}]}
    )
    sources = (pairs, chats)
    assert prepare(*sources, *more, "--out", "direct", fraction=0.2)[0] == 0
    assert prepare(*sources, *more, "--out", "clean", "--out-format", "messages", fraction=0.2)[0] == 0
    assert prepare(*sources, *more, "--out", "clean.jsonl", fraction=0.2)[0] == 0
    heldout = ("--heldout", "clean/validation.jsonl", "--allow-leak")
    assert prepare("clean/train.jsonl", *heldout, *more, "--out", "again")[0] == 0
    assert prepare("clean.jsonl", *more, "--out", "whole")[0] == 0
    assert rows_of("again") == rows_of("direct")
    assert rows_of("whole") == rows_of("direct")
    joined = Path("clean/train.jsonl").read_text("utf-8") + Path("clean/validation.jsonl").read_text("utf-8")
    assert joined == Path("clean.jsonl").read_text("utf-8")
    assert json.loads(Path("clean/audit.json").read_text("utf-8"))["audit"]["train"]["kept"]


def test_rows_that_no_file_of_messages_holds_are_refused(prepare):
    text = write_rows(
        "text.jsonl", *[{"text": f"Pears are sold by the kilo, {n} of them."} for n in range(3)]
    )
    pairs = write_rows("pairs.jsonl", *map(pair, range(3)))
    code, told, _ = prepare(text, pairs, "--out", "clean.jsonl")
    assert code == 65
    assert "turns and running text" in told["error"]["message"]
    assert not Path("clean.jsonl").exists()
    assert prepare(text, "--out", "text-again.jsonl")[0] == 0


def test_out_names_what_is_written(sft, prepare, tmp_path):
    rows = str(write_pairs(tmp_path / "rows.jsonl"))
    assert prepare(rows, "--out-format", "messages")[0] == 2
    assert prepare(rows, "--out", "a.jsonl", "--out-format", "parquet")[0] == 2
    assert prepare(rows, "--out", "a.jsonl")[0] == 0
    assert prepare(rows, "--out", "a.jsonl")[0] == 73
