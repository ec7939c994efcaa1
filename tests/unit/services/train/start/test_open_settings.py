"""Settings that nobody chose in whole runs: recorded, recalled, and what is said of runs that are too short."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.config import auto
from sftcli.config.resolve import parse_set, resolve
from sftcli.data.conversations.heldout_split import choose_heldout
from sftcli.errors import MismatchError
from sftcli.events import Ending, Notice, Session, Warned
from sftcli.services.prepare.doubts import more_heldout
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.services.train.start.open_settings import doubts
from tests.support.runs import StopAtStep, copied_here, numbers_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER = 10**9
RUNS = Path("runs")


def asked(*changes, name="one"):
    sets = (
        "model.name=model",
        "data.sources=rows.jsonl",
        f"run.name={name}",
        "checkpoint.every_steps=4",
        *changes,
    )
    return resolve(preset=None, config_file=None, overrides=[*map(parse_set, sets)], environ={})


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder with rows, a model and the finished run ``whole``, and what was said in it."""
    folder, flag = tmp_path_factory.mktemp("origin"), StopAtStep(NEVER)
    build_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 25)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(asked(name="whole"), flag)
    return folder, flag


@pytest.fixture(autouse=True)
def whole(origin, tmp_path, monkeypatch):
    """What was said in the run; a copy of its folder is where the test is."""
    folder, flag = origin
    copied_here(folder, tmp_path, monkeypatch)
    return flag


def other_rules(monkeypatch):
    """Let another release of the program have other rules."""
    rules = tuple(replace(rule, batch_size=3, epochs=9) for rule in auto.ROWS_RULES)
    monkeypatch.setattr(auto, "ROWS_RULES", rules)


def told(flag, kind):
    return [event.text for event in flag.events if isinstance(event, kind)]


def test_a_run_tells_and_records_what_was_decided(whole):
    run = RunFolder(RUNS / "whole")
    settings, origins = read_settings(run), json.loads(run.origins.read_text())
    assert (settings.training.batch_size, settings.training.epochs, settings.data.heldout_fraction) == (
        4,
        5,
        0.2,
    )
    assert (settings.training.learning_rate, settings.training.max_steps) == (3e-4, 0)
    assert {origins[key] for key in auto.AUTO_KEYS} == {"auto: 25 rows", "auto: 35k parameters"}
    assert [text for text in told(whole, Notice) if text.startswith("auto")] == [
        "auto: 25 rows: batch size 4, 5 epochs, 20% held out; 35k parameters: learning rate 0.0003"
    ]


@pytest.mark.parametrize("way", ["resume", "train --resume auto"])
def test_a_stopped_run_goes_on_with_what_it_decided_bit_for_bit(monkeypatch, way):
    assert train(asked(), StopAtStep(7)).ending is Ending.STOPPED
    other_rules(monkeypatch)
    flag = StopAtStep(NEVER)
    if way == "resume":
        resume_training(ResumeRequest(root=RUNS, run="one"), Session(flag, flag))
    else:
        train(asked(), flag, auto=True)
    assert not [text for text in told(flag, Notice) if text.startswith("auto")]
    assert numbers_of(RUNS / "one") == numbers_of(RUNS / "whole")
    assert tensors_of(RUNS / "one", 25) == tensors_of(RUNS / "whole", 25)


def test_a_finished_run_is_what_is_asked_for_also_under_other_rules(monkeypatch):
    other_rules(monkeypatch)
    assert train(asked(name="whole"), StopAtStep(NEVER), auto=True).step == 25
    with pytest.raises(MismatchError, match=r"training\.epochs was 5.0, is 1"):
        train(asked("training.epochs=1", name="whole"), StopAtStep(NEVER), auto=True)


def test_what_was_chosen_for_a_run_is_not_recalled_for_one_that_leaves_it_open():
    train(asked("training.epochs=1"), StopAtStep(NEVER))
    with pytest.raises(MismatchError, match=r"training\.epochs was 1, is 5|training\.epochs was 1\.0, is 5"):
        train(asked(), StopAtStep(NEVER), auto=True)


def test_the_share_that_was_decided_finds_the_rows_that_were_prepared_then():
    train(asked(), StopAtStep(3))
    flag = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=RUNS, run="one"), Session(flag, flag))
    assert [event.cached for event in flag.events if type(event).__name__ == "DataPrepared"] == [True]
    assert len(list((Path("cache") / "prepared").iterdir())) == 1


def complete(settings, rows):
    found = auto.decide_open(settings, rows=rows, parameters=10**8, heldout_fraction=0.2).settings
    return found.model_copy(update={"training": found.training.for_rows(rows)})


@pytest.mark.parametrize("rows", [100, 150, 173, 999])
def test_the_share_that_is_named_holds_out_as_many_rows_as_are_wanted(rows):
    settings = resolve(
        preset=None, config_file=None, overrides=[parse_set("data.heldout_max_rows=20")], environ={}
    ).settings
    flags = more_heldout(settings, 50, of=rows).partition(": ")[2].split("--set ")[1:]
    chosen = resolve(
        preset=None, config_file=None, overrides=[parse_set(flag.strip()) for flag in flags], environ={}
    ).settings.data
    keys = {str(row).encode(): 1 for row in range(rows)}
    held = choose_heldout(keys, fraction=chosen.heldout_fraction, max_rows=chosen.heldout_max_rows, seed=0)
    assert len(held) >= 50


@pytest.mark.parametrize(
    ("sets", "rows", "held", "said"),
    [
        (["training.batch_size=32", "training.epochs=3"], 147, 30, ["14 steps teach little; to train longer: --epochs 14"]),
        (["training.max_steps=5"], 30, 30, ["5 steps teach little; to train longer: --max-steps 60"]),
        (["training.max_steps=30"], 1000, 30, ["the steps reach 48% of the rows; to see all of them once: --epochs 1"]),
        (["training.max_steps=60"], 100_000, 30, []),
        ([], 120, 30, []),
        ([], 120, 3, ["3 held-out rows prove little; to hold out more: --set data.heldout_fraction=0.17"]),
        (["training.epochs=30"], 15, 1, ["1 held-out row proves little; to name others: --heldout FILE"]),
        (["data.heldout_sources=h.jsonl"], 120, 3, ["3 held-out rows prove little; name more with --heldout"]),
        ([], 120, 0, []),
    ],
)  # fmt: skip
def test_short_runs_and_few_held_out_rows_are_told_with_the_flag_that_changes_it(sets, rows, held, said):
    settings = resolve(preset=None, config_file=None, overrides=[*map(parse_set, sets)], environ={}).settings
    assert list(doubts(settings, complete(settings, rows), train_rows=rows, heldout_rows=held)) == said


@pytest.mark.parametrize(
    ("sets", "parameters", "said"),
    [
        (["training.learning_rate=1e-3"], 1.35e8,
         ["learning rate 0.001 is higher than usual for a model of 135M parameters (5e-06 to 0.0003): it may forget what it knew"]),
        (["training.learning_rate=1e-4"], 8e9,
         ["learning rate 0.0001 is higher than usual for a model of 8B parameters (5e-06 to 5e-05): it may forget what it knew"]),
        (["training.learning_rate=1e-7"], 8e9,
         ["learning rate 1e-07 is lower than usual for a model of 8B parameters (5e-06 to 5e-05): it adapts slowly"]),
        (["training.learning_rate=5e-5"], 8e9, []),
        (["training.learning_rate=5e-6"], 1.35e8, []),
        (["training.learning_rate=1e-3", "adapter.kind=lora"], 8e9, []),
        ([], 8e9, []),
    ],
)  # fmt: skip
def test_a_rate_far_from_usual_is_remarked_on_unless_nobody_chose_it(sets, parameters, said):
    settings = resolve(preset=None, config_file=None, overrides=[*map(parse_set, sets)], environ={}).settings
    assert list(auto.unusual_rate(settings, int(parameters))) == said


@given(rows=st.integers(1, 10**6), parameters=st.integers(10**6, 10**11))
def test_what_is_decided_is_never_remarked_on(rows, parameters):
    settings = resolve(preset=None, config_file=None, overrides=[], environ={}).settings
    found = auto.decide_open(settings, rows=rows, parameters=parameters, heldout_fraction=0.2)
    assert list(auto.unusual_rate(found.settings, parameters)) == []


def test_a_remark_is_one_note_at_the_start_and_not_on_resuming():
    first = StopAtStep(2)
    train(asked("training.learning_rate=0.5", "training.max_steps=3"), first)
    assert [text for text in told(first, Notice) if text.startswith("learning rate 0.5 is higher")] != []
    assert [text for text in told(first, Warned) if "learning rate" in text] == []
    again = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=RUNS, run="one"), Session(again, again))
    assert [text for text in told(again, Notice) if "higher than usual" in text] == []


def test_a_short_run_warns_before_it_starts_and_not_again_when_it_goes_on():
    first = StopAtStep(2)
    train(asked("training.max_steps=6"), first)
    assert "6 steps teach little; to train longer: --max-steps 60" in told(first, Warned)
    again = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=RUNS, run="one"), Session(again, again))
    assert not [text for text in told(again, Warned) if "teach little" in text]
