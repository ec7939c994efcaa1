"""Laws of a run with packed rows, a curriculum and a share of pretraining text: resumed, repeated, and in its order."""

import json
from pathlib import Path

import pytest
import torch

from sftcli.data.batches.batch import BatchPlan
from sftcli.data.prepared.store import open_prepared
from sftcli.events import Ending, Session
from sftcli.services.train.resume import ResumeRequest, resume_training
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train
from tests.support.tiny_model import build_tiny_model

STEPS = 6
NEVER = STEPS + 1
MIX = (
    "data.order=score", "data.score_column=grade", "data.text_fraction=0.2", "training.max_steps=6",
    "training.micro_batch_tokens=120", "training.packing=on", "data.heldout_fraction=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder with graded rows, texts, a tiny model with dropout and an uninterrupted run, with a cache of its own."""
    folder = tmp_path_factory.mktemp("plan")
    rows = [
        {"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}." * (1 + n % 3), "grade": n * 7 % 25}
        for n in range(25)
    ]
    texts = [{"text": f"The ferry number {n} leaves at {n}." * (1 + n % 4)} for n in range(9)]
    for name, values in (("rows", rows), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)) + "\n", encoding="utf-8")
    build_tiny_model(folder / "model", dropout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        outcome = train(mixed(folder, "whole"), StopAtStep(NEVER))
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, STEPS)
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def mixed(folder: Path, name: str, *changes: str):
    texts = f"data.text_sources={folder / 'texts.jsonl'}"
    return settings_of(folder, folder / "model", f"run.name={name}", texts, *MIX, *changes)


def steps_of(run: Path) -> list[dict[str, object]]:
    return [event for event in numbers_of(run) if event["event"] == "StepDone"]


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_stopped_after_any_step_and_resumed_equals_uninterrupted_bit_for_bit(place, stop_at):
    name, flag = f"cut-{stop_at}", StopAtStep(NEVER)
    train(mixed(place, name), StopAtStep(stop_at))
    torch.manual_seed(12345)
    outcome = resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, STEPS)
    whole, cut = place / "runs" / "whole", place / "runs" / name
    assert tensors_of(cut, STEPS) == tensors_of(whole, STEPS)
    assert numbers_of(cut) == numbers_of(whole)


def test_steps_of_text_are_counted_apart_and_are_their_share(place):
    steps = steps_of(place / "runs" / "whole")
    texts = [step for step in steps if step["text_tokens"]]
    assert [step["step"] for step in texts] == [4]
    assert all(step["text_tokens"] == step["tokens"] > step["response_tokens"] for step in texts)
    assert all(step["response_tokens"] == step["tokens"] - step["examples"] for step in texts)
    assert [step["epoch"] for step in steps][-1] == pytest.approx(5 * 4 / 20)


def test_packed_rows_of_a_step_are_fewer_than_its_examples_and_hold_no_padding(place):
    steps = steps_of(place / "runs" / "whole")
    assert {step["examples"] for step in steps} == {4}
    assert all(step["rows"] == step["micro_batches"] < 4 for step in steps)
    assert {step["padding_tokens"] for step in steps} == {0}


def test_twenty_steps_are_the_same_in_two_runs_and_nearly_the_same_without_packing(place):
    losses = {}
    for name, packing in (("first", "on"), ("second", "on"), ("padded", "off")):
        changes = ("training.max_steps=20", f"training.packing={packing}", "training.learning_rate=1e-4")
        model = build_tiny_model(place / "still") if not (place / "still").exists() else place / "still"
        train(mixed(place, name, *changes, f"model.name={model}"), StopAtStep(NEVER + 20))
        losses[name] = [step["loss"] for step in steps_of(place / "runs" / name)]
    assert len(losses["first"]) == 20
    assert losses["first"] == losses["second"]
    assert losses["padded"] == pytest.approx(losses["first"], rel=1e-4)
    assert losses["padded"] != losses["first"]


def test_a_curriculum_by_score_goes_from_the_lowest_to_the_highest_in_each_epoch(place):
    (folder,) = (place / "cache" / "prepared").iterdir()
    rows = open_prepared(folder).train
    plan = BatchPlan(rows, batch_size=4, micro_batch_size=4, pad_id=2, seed=0, keys=rows.scores)
    for epoch in range(2):
        steps = range(epoch * 5, (epoch + 1) * 5)
        scores = [rows.scores[index] for step in steps for index in plan.example_ids(step)]
        assert scores == sorted(rows.scores)
