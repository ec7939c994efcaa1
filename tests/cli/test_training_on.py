"""``sft train --model RUN`` knows the run before: its rows are replayed, what it held out is measured, and a loss is told."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import program
from tests.support.tiny_model import build_tiny_model

SMALL = ("--batch-size", "8", "--learning-rate", "1e-2", "--set", "data.heldout_fraction=0.4")


def write(path: Path, question: str, answer: str, count: int = 60) -> Path:
    rows = [{"question": question.format(number), "answer": answer} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows of three kinds."""
    folder = tmp_path_factory.mktemp("training-on")
    build_tiny_model(folder / "tiny")
    write(folder / "sums.jsonl", "What is {0} plus {0}?", "a sum")
    write(folder / "colors.jsonl", "Name the color of thing {0}", "red")
    write(folder / "names.jsonl", "Who wrote book {0}?", "nobody")
    return folder


@pytest.fixture
def sft(place, monkeypatch, capsys):
    """Run the program in the folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))

    return program(monkeypatch, capsys)


@pytest.fixture
def first(sft, place) -> str:
    if not (place / "runs" / "first" / "final").exists():
        code, _, err = sft(
            "train", "--data", "sums.jsonl", "--model", "tiny", "--run", "first", "--max-steps", 30, *SMALL
        )
        assert code == 0, err
    return "first"


@pytest.fixture
def plain(sft, place, first) -> Path:
    """A run that has gone on from the first one on other rows alone."""
    run = place / "runs" / "plain"
    if not run.exists():
        code, _, err = sft(
            "train", "--data", "colors.jsonl", "--model", first, "--run", "plain", "--max-steps", 20, *SMALL
        )
        assert code == 0, err
        (run / "told").write_text(err, encoding="utf-8")
    return run


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def about(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def words(text: str) -> str:
    return " ".join(text.split())


def test_what_was_lost_is_the_verdict_everywhere(sft, place, plain):
    err = words((plain / "told").read_text(encoding="utf-8"))
    before, after = events(plain, "EarlierDone")
    assert (before["right"], before["answered"], before["step"]) == (24, 24, 0)
    assert (after["right"], after["lost"], after["gained"], after["step"]) == (0, 24, 0, 20)
    assert after["rise"] == pytest.approx(after["loss"] - before["loss"])
    lost = (
        f"the rows of first: held-out loss {before['loss']:.3f} -> {after['loss']:.3f}, right 24 -> 0 of 24"
    )
    assert f"verdict: forgetting ({lost}; on its own rows it is good: held-out loss fell" in err
    assert lost.replace(">", "&gt;") in (plain / "report.html").read_text(encoding="utf-8")
    assert lost in words(sft("show", "plain")[1])
    assert json.loads(sft("show", "plain", "--json")[1])["earlier"][0]["lost_fraction"] == 1
    assert [one["run"] for one in about(plain)["lineage"]] == ["first"]
    report = json.loads(sft("eval", "plain", "--no-base", "--max-rows", "2", "--json")[1])
    assert report["verdict"]["kind"] == "forgetting"


def test_one_warning_before_the_first_step_has_the_command_that_replays(sft, place, plain):
    (told,) = [one["text"] for one in events(plain, "Warned") if "without its rows" in one["text"]]
    kinds = [json.loads(line)["event"] for line in (plain / "events.jsonl").read_text().splitlines()]
    assert kinds.index("Warned") < kinds.index("StepDone")
    command = told.partition(": ")[2]
    assert command.endswith("--replay 20%")
    plan = json.loads(sft(*shlex.split(command)[1:], "--plan", "--json")[1])
    assert (plan["train_examples"], plan["replayed_examples"]) == (45, 9)


def test_replayed_rows_keep_the_skill_and_where_they_came_from(sft, place, first):
    flags = ("--data", "colors.jsonl", "--model", first, "--max-steps", 20, "--replay", "40%")
    code, _, err = sft("train", "--run", "kept", *flags, "--fail-above", "lost=0.2", *SMALL)
    assert code == 0, err
    run = place / "runs" / "kept"
    assert "replay: 24 of 60 training rows (40%) are replayed: 24 of first" in words(err)
    assert "forgetting" not in err
    assert "without its rows" not in err
    assert "replay = 0.4" in (run / "config.toml").read_text(encoding="utf-8")
    audit = json.loads((run / "data.json").read_text(encoding="utf-8"))["audit"]
    assert audit["replayed"]["sources"]["replayed from first"]["kept"] == 24
    assert list(audit["train"]["sources"]) == ["colors.jsonl"]
    assert "24 rows replayed from first" in (run / "report.html").read_text(encoding="utf-8")
    assert events(run, "EarlierDone")[1]["lost"] <= 4
    rows = sft("eval", "kept", "--data", "sums.jsonl", "--no-base", "--max-rows", "1", "--json")[1]
    assert json.loads(rows)["trained_on"]["same_row"] == 24  # and none that the first run held out


def test_more_than_is_allowed_to_be_lost_ends_with_3(sft, place, first):
    flags = ("--data", "colors.jsonl", "--model", first, "--max-steps", 8, *SMALL)
    code, _, err = sft("train", "--run", "failed", *flags, "--fail-above", "lost=0.05")
    assert code == 3
    assert "lost is 1, above 0.05" in err
    assert (place / "runs" / "failed" / "final").is_dir()
    code, out, _ = sft("resume", "failed", "--max-steps", "9", "--fail-above", "loss_rise=0.1", "--json")
    assert code == 3
    assert json.loads(out)["error"]["kind"] == "threshold"
    measured = [(one["step"], one["is_end"]) for one in events(place / "runs" / "failed", "EarlierDone")]
    assert measured == [(0, False), (9, True)]  # that of the former end is no longer the end
    code, _, err = sft("train", *flags, "--fail-above", "match=0.1")
    assert code == 2
    assert "there are loss_rise, lost" in err or "did you mean" in err
    code, _, err = sft("train", "--data", "colors.jsonl", "--model", "tiny", "--fail-above", "lost=0.1")
    assert code == 2
    assert "tiny is not the model of a run" in err


def test_a_third_run_knows_the_first_and_the_second(sft, place, plain):
    flags = ("--data", "names.jsonl", "--model", "plain", "--max-steps", 4, "--replay", "50%", *SMALL)
    code, _, err = sft("train", "--run", "third", *flags)
    assert code == 0, err
    run = place / "runs" / "third"
    assert [one["run"] for one in about(run)["lineage"]] == ["plain", "first"]
    measured = events(run, "EarlierDone")
    assert [(one["run"], one["step"]) for one in measured] == [
        ("first", 0),
        ("plain", 0),
        ("first", 4),
        ("plain", 4),
    ]
    before = [events(plain, kind)[-1]["loss"] for kind in ("EarlierDone", "HeldoutDone")]
    assert [one["loss"] for one in measured[:2]] == pytest.approx(before, abs=1e-5)
    assert "36 of 72 training rows (50%) are replayed: 18 of first, 18 of plain" in words(err)


def test_lineage_is_found_in_runs_that_recorded_none(sft, place, plain):
    kept = (plain / "run.json").read_text(encoding="utf-8")
    try:
        older = {key: value for key, value in json.loads(kept).items() if key != "lineage"}
        (plain / "run.json").write_text(json.dumps(older), encoding="utf-8")
        code, _, err = sft(
            "train", "--data", "names.jsonl", "--model", "plain", "--run", "older", "--max-steps", 1, *SMALL
        )
    finally:
        (plain / "run.json").write_text(kept, encoding="utf-8")
    assert code == 0, err
    assert [one["run"] for one in about(place / "runs" / "older")["lineage"]] == ["plain", "first"]


def test_rows_that_are_gone_are_prepared_again_or_refused_by_name(sft, place, first):
    rows = place / "sums.jsonl"
    kept = rows.read_text(encoding="utf-8")
    flags = ("--data", "colors.jsonl", "--model", first, "--max-steps", 1, *SMALL)
    shutil.rmtree(place / "cache" / "prepared")
    code, _, err = sft("train", "--run", "again", *flags, "--replay", "25%")
    assert code == 0, err
    assert "preparing the rows of first again" in err
    again, before = (events(place / "runs" / run, "EarlierDone") for run in ("again", "again"))
    assert again[0]["right"] == before[0]["right"] == 24
    shutil.rmtree(place / "cache" / "prepared")
    try:
        rows.write_text(kept.replace("a sum", "another"), encoding="utf-8")
        code, _, err = sft("train", "--run", "refused", *flags, "--replay", "25%")
        assert code != 0
        assert "the rows of first cannot be replayed" in words(err)
        assert "its sources are not what they were" in words(err)
        assert "leave --replay out" in words(err)
        code, _, err = sft("train", "--run", "unmeasured", *flags)
        assert code == 0, err
        assert "what is lost of first is not measured" in words(err)
    finally:
        rows.write_text(kept, encoding="utf-8")


def test_rows_that_were_split_by_a_seed_of_their_own_are_prepared_again(sft, place):
    flags = ("--max-steps", 1, *SMALL)
    split = ("--set", "data.split_seed=7")
    assert sft("train", "--data", "sums.jsonl", "--model", "tiny", "--run", "seeded", *split, *flags)[0] == 0
    shutil.rmtree(place / "cache" / "prepared")
    onward = ("--data", "colors.jsonl", "--model", "seeded", "--run", "onward", "--replay", "25%")
    code, _, err = sft("train", *onward, *flags)
    assert code == 0, err
    assert "preparing the rows of seeded again" in err


def test_replay_without_an_earlier_run_is_refused_before_anything_is_made(sft, place):
    code, _, err = sft(
        "train", "--data", "colors.jsonl", "--model", "tiny", "--run", "none", "--replay", "20%"
    )
    assert code == 2
    assert "tiny is not the model of a run" in err
    assert "--model RUN" in err
    assert not (place / "runs" / "none").exists()


@pytest.mark.parametrize("share", ["20", "95%", "1%%", "some"])
def test_a_share_that_is_none_is_refused_by_its_flag(sft, share):
    code, _, err = sft("train", "--data", "colors.jsonl", "--model", "first", "--replay", share)
    assert code == 2
    assert "a share such as 0.2 or 20%" in words(err)


def test_adapters_know_the_runs_before_them(sft, place, first):
    """An adapter on the model of a run, then the adapter trained on."""
    small = ("--set", "data.heldout_fraction=0.4", "--batch-size", "8")
    lora = ("--lora", "--rank", "4", "--learning-rate", "1e-2")
    code, _, err = sft(
        "train", "--data", "colors.jsonl", "--model", first, "--run", "lora", "--max-steps", 12, *lora, *small
    )
    assert code == 0, err
    run = place / "runs" / "lora"
    assert [one["run"] for one in about(run)["lineage"]] == ["first"]
    assert events(run, "EarlierDone")[0]["right"] == 24
    flags = ("--data", "names.jsonl", "--model", "lora", "--max-steps", 2, "--replay", "50%", *small)
    code, _, err = sft("train", "--run", "lora-on", *flags)
    assert code == 0, err
    onward = place / "runs" / "lora-on"
    assert [one["run"] for one in about(onward)["lineage"]] == ["lora", "first"]
    before = {one["run"]: one["loss"] for one in events(onward, "EarlierDone") if not one["step"]}
    assert before["first"] == pytest.approx(events(run, "EarlierDone")[-1]["loss"], abs=1e-5)
    assert before["lora"] == pytest.approx(events(run, "HeldoutDone")[-1]["loss"], abs=1e-5)
    merged = ("export", "lora", "--to", "hf", "--out", "merged")
    assert sft(*merged)[0] == 0
    flags = ("--data", "names.jsonl", "--model", "merged", "--max-steps", 1, "--replay", "50%", *small)
    code, _, err = sft("train", "--run", "from-merged", *flags)
    assert code == 0, err
    assert [one["run"] for one in about(place / "runs" / "from-merged")["lineage"]] == ["lora", "first"]


def test_an_exported_model_whose_run_is_not_here_is_told(sft, place, tmp_path):
    """The mark of the run is from elsewhere: it names a run that is gone, or tries to name a folder."""
    copy = shutil.copytree(place / "tiny", tmp_path / "theirs")
    (copy / "sft_run.json").write_text(
        json.dumps({"run": "../../runs/first", "data": "0" * 64}), encoding="utf-8"
    )
    flags = ("--data", "names.jsonl", "--model", copy, "--run", "theirs", "--max-steps", 1, *SMALL)
    code, _, err = sft("train", *flags, "--replay", "10%")
    assert code == 65
    assert "the rows of first cannot be replayed: its folder" in words(err)
    code, _, err = sft("train", *flags)
    assert code == 0, err
    assert "what is lost of first is not measured: its folder" in words(err)
