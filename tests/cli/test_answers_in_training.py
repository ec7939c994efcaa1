"""Held-out prompts answered in the course of a training: what is told of them, and that nothing of the training moves."""

import json
from dataclasses import replace

import pytest
import torch

from sftcli.config.resolve import parse_set
from sftcli.errors import UsageError
from sftcli.events import HeldoutDone, Notice, Session
from sftcli.services.evaluate.evaluate import run_evaluation
from sftcli.services.evaluate.request import EvalRequest
from sftcli.services.report.html import write_report
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.summary import summarize_run
from sftcli.services.train.answers import HeldoutQuestions
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.runs import StopAtStep, events_of, numbers_of, settings_of, tensors_of, train
from tests.support.tiny_model import build_tiny_model, same_weights

NEVER = 999
LABELS = {"billing": "invoice", "refund": "return", "shipping": "parcel"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    rows = [
        {"question": f"Ticket {number} on my {word}", "answer": label}
        for number in range(20)
        for label, word in LABELS.items()
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    build_tiny_model(folder / "model", dropout=0.1)
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def labels(place, run, *changes):
    sets = (
        f"run.name={run}",
        "training.precision=fp32",
        "training.max_steps=10",
        "training.eval_answers=4",
        *changes,
    )
    return settings_of(place, place / "model", *sets)


def to_the_end():
    flag = StopAtStep(NEVER)
    return Session(flag, flag)


def given(run):
    return [event.given for event in read_events(run) if isinstance(event, HeldoutDone)]


@pytest.fixture(scope="module")
def answered(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(place / "cache"))
        flag = StopAtStep(NEVER)
        outcome = train(labels(place, "answered"), flag)
    return outcome, flag, place / "runs" / "answered"


def test_the_same_prompts_are_answered_and_graded_at_each_evaluation(answered):
    outcome, flag, run = answered
    found = given(RunFolder(run))
    assert len(found) == 4  # before, at steps 4, 8 and 10
    assert {answers.measure for answers in found} == {"label"}
    assert len({tuple((one.row, one.expected) for one in answers.given) for answers in found}) == 1
    assert [len(answers.given) for answers in found] == [4] * 4
    for answers in found:
        right = sum(one.text == one.expected and not one.is_cut for one in answers.given)
        assert answers.right == right == round(4 * answers.score)
    assert (outcome.measure, outcome.first_score, outcome.last_score) == (
        "label",
        found[0].score,
        found[-1].score,
    )
    assert [
        event.text for event in flag.events if isinstance(event, Notice) and "answered" in event.text
    ] == [
        "4 held-out prompts answered at each evaluation; check: label (3 labels) - the 12 expected answers are 3 different ones"
    ]


def test_losses_weights_and_random_streams_are_those_of_a_training_without_answers(place, answered):
    train(labels(place, "silent", "training.eval_answers=0"), StopAtStep(NEVER))
    silent, run = place / "runs" / "silent", answered[2]
    added = {"answers", "by_check"}
    numbers = [
        [{k: v for k, v in event.items() if k not in added} for event in numbers_of(one)]
        for one in (silent, run)
    ]
    assert numbers[0] == numbers[1]
    assert tensors_of(silent, 10) == tensors_of(run, 10)
    assert all(not event["answers"] for event in events_of(silent, "HeldoutDone"))


@pytest.mark.parametrize("stop_at", [3, 4, 9])
def test_a_run_that_is_stopped_and_resumed_gives_the_answers_of_one_that_never_stopped(
    place, answered, stop_at
):
    run = place / "runs" / f"stopped-{stop_at}"
    train(labels(place, run.name), StopAtStep(stop_at))
    resume_training(ResumeRequest(root=run.parent, run=run.name), to_the_end())
    assert numbers_of(run) == numbers_of(answered[2])
    assert tensors_of(run, 10) == tensors_of(answered[2], 10)


def test_a_stop_while_prompts_are_answered_leaves_the_evaluation_to_the_next_start(
    place, answered, monkeypatch
):
    flag, asked = StopAtStep(NEVER), HeldoutQuestions.__call__

    def stopping(self, stop):
        flag.is_raised = self.trainer.state.step == 4
        return asked(self, stop)

    monkeypatch.setattr(HeldoutQuestions, "__call__", stopping)
    train(labels(place, "cut"), flag)
    run = place / "runs" / "cut"
    assert [event["step"] for event in events_of(run, "HeldoutDone")] == [0]
    monkeypatch.undo()
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))
    resume_training(ResumeRequest(root=run.parent, run="cut"), to_the_end())
    assert numbers_of(run) == numbers_of(answered[2])


@pytest.mark.parametrize(("seconds", "is_given"), [(0.1, True), (10.0, False)])
def test_nobody_is_made_to_wait_for_answers_that_were_not_asked_for(place, monkeypatch, seconds, is_given):
    monkeypatch.setattr(HeldoutQuestions, "_seconds", lambda _: seconds)
    monkeypatch.setattr(
        HeldoutQuestions, "_training_seconds", lambda _: 8.0
    )  # and there are four evaluations
    run, flag = place / "runs" / f"auto-{is_given}", StopAtStep(5)
    train(labels(place, run.name, "training.eval_answers=none"), flag)
    told = [
        event.text for event in flag.events if isinstance(event, Notice) and "held-out prompts" in event.text
    ]
    assert told[0].startswith(
        "8 held-out prompts answered at each evaluation: about 5% of the training's time; check: label"
        if is_given
        else "held-out prompts are not answered at evaluations, which would take about 500% of the training's time; "
        "to ask for it: --set training.eval_answers=8"
    )
    monkeypatch.setattr(HeldoutQuestions, "_seconds", lambda _: 9 - seconds)  # a run that goes on has decided
    resume_training(ResumeRequest(root=run.parent, run=run.name), to_the_end())
    assert [answers is not None for answers in given(RunFolder(run))] == [is_given] * 4


@pytest.mark.parametrize("asked", ["training.eval_answers=4", "training.metric_for_best=check"])
def test_a_run_that_goes_on_gives_the_answers_that_it_is_asked_for_then(place, monkeypatch, asked):
    monkeypatch.setattr(HeldoutQuestions, "_seconds", lambda _: 10.0)
    monkeypatch.setattr(HeldoutQuestions, "_training_seconds", lambda _: 8.0)
    run = place / "runs" / f"asked-{asked[9:13]}"
    train(labels(place, run.name, "training.eval_answers=none"), StopAtStep(5))
    change = parse_set(asked)
    request = ResumeRequest(
        root=run.parent, run=run.name, overrides=(change,), allowed=(asked.partition("=")[0],)
    )
    resume_training(request, to_the_end())
    assert [answers is not None for answers in given(RunFolder(run))] == [False, False, True, True]


def test_the_time_that_answers_take_is_measured(place, monkeypatch):
    found = []
    monkeypatch.setattr(HeldoutQuestions, "is_cheap", lambda self, **_: found.append(self) or False)
    train(labels(place, "timed", "training.eval_answers=none"), StopAtStep(1))
    (asked,) = found
    assert 0 < asked._seconds() < 10
    one = asked._training_seconds()
    asked.trainer.settings = asked.trainer.settings.model_copy(update={"max_steps": 10_000})
    assert (
        asked._training_seconds() > 20 * one > 0
    )  # a thousand times as many steps, on a machine that is busy


def test_log_show_and_page_have_the_answers(place, answered):
    run = RunFolder(answered[2])
    last = given(run)[-1]
    log = (run.path / "training.log").read_text(encoding="utf-8").splitlines()
    at = next(index for index, line in enumerate(log) if line.startswith("step=10 heldout_loss"))
    assert log[at].endswith(f"measure=label score={last.score:.4f} right={last.right} of=4")
    assert log[at + 1 : at + 5] == [f"answer {one.row}: {json.dumps(one.text)}" for one in last.given]
    summary = summarize_run(run)
    assert (summary.measure, summary.answered, summary.score) == ("label", 4, last.score)
    page = write_report([run], place / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count('type="radio"') == 4
    assert page.count(f">{'after step 10'}: <span") == 4
    assert f"After step 10: label {last.right} of 4 right." in page
    assert f"label: {given(run)[0].right} of 4 right at step 0, {last.right} of 4 right at step 10" in page


def test_the_best_checkpoint_by_a_check_is_the_final_model(place, monkeypatch):
    """Losses fall all the way, and so the score has to decide; of equal scores the lower loss is better."""
    scores = iter((0.0, 0.25, 0.75, 0.75, 0.5, 0.5))
    asked = HeldoutQuestions.__call__
    monkeypatch.setattr(
        HeldoutQuestions, "__call__", lambda self, stop: replace(asked(self, stop), score=next(scores))
    )
    early = (
        "training.metric_for_best=check",
        "training.early_stopping_evals=2",
        "training.eval_every_steps=2",
        "training.max_steps=20",
    )
    flag = StopAtStep(NEVER)
    outcome = train(labels(place, "best", *early, "checkpoint.keep_last=1"), flag)
    run = RunFolder(place / "runs" / "best")
    heldout = {event["step"]: event["loss"] for event in events_of(run.path, "HeldoutDone")}
    best = min((4, 6), key=heldout.get)
    assert outcome.step == best + 4
    assert heldout[outcome.step] < heldout[best]
    assert (outcome.last_heldout_loss, outcome.last_score) == (heldout[best], 0.75)
    saved = {step_of(path): path for path in list_checkpoints(run.checkpoints)}
    assert set(saved) == {best, outcome.step}
    assert same_weights(run.final, saved[best], dtype=torch.float32)
    assert any(
        event.text == f"final/ holds step {best}: its held-out answers score 75.0%, the highest"
        for event in flag.events
        if isinstance(event, Notice)
    )
    summary = summarize_run(run)
    assert (summary.best_step, summary.best_score, summary.best_heldout_loss) == (best, 0.75, heldout[best])
    assert f"at step {best}" in run.report.read_text(encoding="utf-8")
    assert read_snapshot(saved[best]).state.best_score == 0.75


def test_a_best_checkpoint_by_a_check_is_refused_where_there_is_none(place, tmp_path):
    texts = [
        {"question": f"Say {n} once more", "answer": f"well {n}, " + "so " * (n % 7) + "it is"}
        for n in range(25)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts), encoding="utf-8")
    best = ("run.name=none", "training.metric_for_best=check")
    with pytest.raises(
        UsageError, match="metric_for_best is check, and no check fits the 5 expected answers"
    ):
        train(settings_of(tmp_path, place / "model", *best, "training.eval_answers=none"), StopAtStep(NEVER))
    with pytest.raises(UsageError, match="metric_for_best needs held-out rows"):
        train(labels(place, "none", *best, "data.heldout_fraction=0"), StopAtStep(NEVER))
    with pytest.raises(UsageError, match=r"metric_for_best \(check\) grades answers: eval_answers is 0"):
        labels(place, "none", *best, "training.eval_answers=0")
    with pytest.raises(UsageError, match="eval_answers needs held-out rows"):
        train(labels(place, "none", "data.heldout_fraction=0"), StopAtStep(NEVER))


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_the_last_answers_are_those_that_the_final_model_is_scored_by(place, answered, kind):
    if kind == "lora":
        train(labels(place, "lora", "adapter.kind=lora"), StopAtStep(NEVER))
    run = RunFolder(answered[2] if kind == "none" else place / "runs" / "lora")
    request = EvalRequest(
        checkpoint=run.name, data=(), base=None, with_base=False, max_rows=4, root=run.path.parent
    )
    report, last = run_evaluation(request, to_the_end()), given(run)[-1]
    scored = [(one.prompt, one.expected, one.tuned, one.tuned_cut) for one in report.samples]
    assert [(one.prompt, one.expected, one.text, one.is_cut) for one in last.given] == scored
    assert len({one.text for one in last.given} | {""}) > 1
