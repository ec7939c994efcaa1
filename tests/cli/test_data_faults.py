"""Faults of rows and of the cache: message, exit code, and what is left behind."""

import json
from pathlib import Path

import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.data.prepared.store import PreparedDataset
from sftcli.errors import DataError
from sftcli.events import Event, EventSink, NeverStop, Progressed, Session
from sftcli.services.prepare import prepare
from sftcli.services.prepare.prepare import prepare_data
from sftcli.services.prepare.sources import find_sources
from tests.support.recording import RecordingSink


def prepared() -> list[Path]:
    """Return all that the cache of prepared data holds, half-written folders too."""
    return sorted(Path("cache/prepared").glob("*"))


def write_rows(name: str, numbers: range, answer: str = "yes") -> str:
    lines = [json.dumps({"question": f"Is {n} a number?", "answer": answer}) for n in numbers]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def test_held_out_row_that_is_trained_on_is_refused_and_nothing_is_kept(sft, tiny_model):
    train, held = write_rows("a.jsonl", range(9)), write_rows("b.jsonl", range(8, 12))
    code, out, err = sft("prepare", train, "--heldout", held, "--model", tiny_model)
    assert (code, out, prepared()) == (65, "", [])
    assert "1 of 4 held-out rows are trained on too" in err
    assert "--allow-leak" in err


def test_held_out_row_that_is_trained_on_can_be_allowed_and_is_counted(sft, tiny_model):
    train, held = write_rows("a.jsonl", range(9)), write_rows("b.jsonl", range(8, 12))
    leak = ("--allow-leak",)
    code, out, _ = sft("prepare", train, "--heldout", held, "--model", tiny_model, *leak, "--json")
    assert code == 0
    assert "1 are equal in all turns" in json.loads(out)["audit"]["heldout"]["notes"][-1]


def test_same_prompt_with_another_answer_is_noted(sft, tiny_model):
    train, held = write_rows("a.jsonl", range(9)), write_rows("b.jsonl", range(8, 12), answer="no")
    code, out, _ = sft("prepare", train, "--heldout", held, "--model", tiny_model, "--json")
    assert code == 0
    assert "1 have a prompt that is also trained on" in json.loads(out)["audit"]["heldout"]["notes"][-1]


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "[]", '{"format": 9, "files": 5}'])
def test_damaged_cache_is_made_again_and_never_used(sft, rows, tiny_model, damage):
    sft("prepare", rows, "--model", tiny_model)
    (folder,) = prepared()
    shard = folder / "train.arrow"
    whole = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    elif damage == "cut":
        shard.write_bytes(whole[:-100])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(damage, encoding="utf-8")
    code, out, _ = sft("prepare", rows, "--model", tiny_model, "--json")
    assert (code, json.loads(out)["cached"]) == (0, False)
    assert shard.read_bytes() == whole
    assert prepared() == [folder]


def test_prepared_data_says_the_same_from_the_cache(sft, rows, tiny_model):
    first = json.loads(sft("prepare", rows, "--model", tiny_model, "--json")[1])
    again = json.loads(sft("prepare", rows, "--model", tiny_model, "--json")[1])
    assert again == first | {"cached": True}


def test_file_that_changes_while_it_is_prepared_is_refused_and_nothing_is_kept(rows, tiny_model, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(rows.parent / "cache"))

    def append(event: Event, /) -> None:
        if isinstance(event, Progressed):
            with rows.open("a", encoding="utf-8") as file:
                file.write('{"question": "late?", "answer": "yes"}\n')

    data = DataSettings(sources=(str(rows),))
    with pytest.raises(DataError, match="changed while being"):
        prepare_data(
            data, find_sources(data), model_folder=tiny_model, seed=0, session=Session(append, NeverStop())
        )
    assert list((rows.parent / "cache/prepared").glob("*")) == []


def test_file_that_changes_behind_the_key_is_never_stored_under_it(rows, tiny_model, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(rows.parent / "cache"))
    looked = prepare._open_cached

    def change(folder: Path, emit: EventSink) -> PreparedDataset | None:
        rows.write_text('{"question": "other?", "answer": "yes"}\n' * 9, encoding="utf-8")
        return looked(folder, emit)

    monkeypatch.setattr(prepare, "_open_cached", change)
    data = DataSettings(sources=(str(rows),))
    with pytest.raises(DataError, match="changed while being prepared; nothing was saved"):
        prepare_data(
            data,
            find_sources(data),
            model_folder=tiny_model,
            seed=0,
            session=Session(RecordingSink(), NeverStop()),
        )
    assert list((rows.parent / "cache/prepared").glob("*")) == []


def test_file_that_was_another_for_one_pass_is_not_taken_for_itself(rows, tiny_model, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(rows.parent / "cache"))
    text, other = rows.read_text("utf-8"), rows.with_name("other.jsonl")

    def swap(event: Event, /) -> None:
        if isinstance(event, Progressed) and event.task.startswith("preparing"):
            is_over = event.done > 0
            other.write_text(text if is_over else text.replace("?", "!"), encoding="utf-8")
            other.replace(rows)

    data = DataSettings(sources=(str(rows),), heldout_fraction=0)
    with pytest.raises(DataError, match="changed while being"):
        prepare_data(
            data, find_sources(data), model_folder=tiny_model, seed=0, session=Session(swap, NeverStop())
        )
    assert list((rows.parent / "cache/prepared").glob("*")) == []
