"""A finished run that trains longer: its schedule, its exactness, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest

from sftcli.config.resolve import parse_set
from sftcli.errors import MismatchError, NotFoundError, UsageError
from sftcli.events import Ending, Event, FitStarted, Notice, Session, Warned
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume
from tests.support.recording import RecordingSink
from tests.support.runs import (
    StopAtStep,
    copied_here,
    numbers_of,
    settings_of,
    tensors_of,
    train,
    write_rows,
)
from tests.support.tiny_model import build_tiny_model

NEVER = 99
OLD_END, NEW_END = 10, 16
STEPS = ("training.max_steps",)
RUN = Path("runs/exp")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finished after ten steps, with a held-out loss each fourth."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(
            settings_of(Path(), Path("model"), "run.name=exp", "checkpoint.keep_last=20"), StopAtStep(NEVER)
        )
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_here(origin, tmp_path, monkeypatch)


def resume(*sets: str, allowed: tuple[str, ...] = (), flag: StopAtStep | None = None, run: str = "exp"):
    """Return the outcome and what was told."""
    flag = flag or StopAtStep(NEVER)
    request = ResumeRequest(
        root=Path("runs"), run=run, overrides=tuple(map(parse_set, sets)), allowed=allowed
    )
    return resume_training(request, Session(flag, flag)), flag.events


def texts(events: list[Event], kind: type) -> str:
    return "\n".join(event.text for event in events if isinstance(event, kind))


def longer(end: int = NEW_END, flag: StopAtStep | None = None, run: str = "exp"):
    return resume(f"training.max_steps={end}", allowed=STEPS, flag=flag, run=run)


def rate(step: int, end: int) -> float:
    """Return the rate of step ``step``, counted from 1, of a cosine that has no warm-up and ends at ``end``."""
    return 1e-2 * (1 + math.cos(math.pi * (step - 1) / end)) / 2


def test_schedule_is_stretched_to_the_new_end_and_told(place):
    outcome, events = longer()
    assert (outcome.ending, outcome.step, outcome.last_step) == (Ending.FINISHED, NEW_END, NEW_END)
    steps = [event for event in numbers_of(RUN) if event["event"] == "StepDone"]
    assert [event["step"] for event in steps] == list(range(1, NEW_END + 1))
    ends = [OLD_END] * OLD_END + [NEW_END] * (NEW_END - OLD_END)
    assert [event["learning_rate"] for event in steps] == pytest.approx(
        [rate(step, end) for step, end in enumerate(ends, start=1)]
    )
    assert texts(events, Warned) == (
        "the run ends at step 16, no longer at 10, and its cosine schedule is stretched to that: "
        f"the learning rate was {rate(10, 10):.3g} at step 10 and is {rate(11, 16):.3g} at step 11"
    )
    assert RunFolder(RUN).is_finished
    assert "training.max_steps</td><td>16</td>" in (RUN / "report.html").read_text().replace("<wbr>", "")
    entry = json.loads((RUN / "run.json").read_text())["resumed"][-1]
    assert (entry["step"], entry["allowed"]["training.max_steps"]) == (OLD_END, ["10", "16"])


@pytest.mark.parametrize("step", [11, 12, 14])
def test_stopped_and_resumed_in_between_equals_never_stopped_bit_for_bit(place, step):
    shutil.copytree(RUN, "runs/whole")
    longer(run="whole")
    outcome, _ = longer(flag=StopAtStep(step))
    assert (outcome.step, outcome.last_step) == (step, NEW_END)
    outcome, events = resume()  # the new end is remembered
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, NEW_END)
    assert not texts(events, Warned)
    assert tensors_of(RUN, NEW_END) == tensors_of(Path("runs/whole"), NEW_END)
    assert numbers_of(RUN) == numbers_of(Path("runs/whole"))


def test_killed_before_the_first_new_step_goes_on_to_the_new_end(place):
    class Killed(StopAtStep):
        def __call__(self, event: Event, /) -> None:
            if isinstance(event, FitStarted):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        longer(flag=Killed(NEVER))
    assert not RunFolder(RUN).is_finished
    outcome, events = resume()
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, NEW_END)
    assert "stretched" in texts(events, Warned)


def test_epochs_are_another_end_too(place):
    outcome, _ = resume("training.epochs=3", allowed=("training.epochs",))
    assert outcome.step == 15
    again, events = resume()
    assert again.step == 15
    assert "complete already: step 15; to train it longer: sft resume exp --max-steps 30" in texts(
        events, Notice
    )


def test_replays_on_both_sides_of_the_old_end_prove_to_be_equal(place):
    longer()
    silent = Session(RecordingSink(), StopAtStep(NEVER))
    for step, following in ((6, 9), (9, 10), (10, 12), (15, 16)):
        proved = verify_resume(ResumeRequest(root=Path("runs"), run="exp", step=step), silent)
        assert (proved.first, proved.second) == (step, following)


def test_what_else_differs_is_refused_and_the_way_is_told(place):
    before = sorted(path for path in RUN.rglob("*"))
    with pytest.raises(MismatchError, match=r"training\.max_steps was 0, is 16") as caught:
        resume("training.max_steps=16")
    assert "sft resume exp --max-steps STEPS, or --epochs N" in caught.value.hint
    with pytest.raises(MismatchError, match=r"training\.learning_rate was 0\.01, is 0\.5"):
        resume("training.learning_rate=0.5", allowed=("training.learning_rate",))
    with pytest.raises(MismatchError, match=r"training\.learning_rate was 0\.01, is 0\.5"):
        resume("training.learning_rate=0.5", "training.max_steps=16", allowed=STEPS)
    with pytest.raises(UsageError, match="at step 10, so there is nothing to train up to step 7"):
        longer(7)
    with pytest.raises(UsageError, match="at step 10, so there is nothing to train up to step 10"):
        resume("training.epochs=1.99", allowed=("training.epochs",))
    assert "complete already: step 10" in texts(longer(10)[1], Notice)
    assert sorted(path for path in RUN.rglob("*")) == before
    assert RunFolder(RUN).is_finished


def test_without_a_checkpoint_a_finished_run_is_not_started_over(place):
    shutil.rmtree(RUN / "checkpoints")
    with pytest.raises(NotFoundError, match="no checkpoint to train on from") as caught:
        longer()
    assert "sft train --model exp" in caught.value.hint
    assert RunFolder(RUN).is_finished


def test_a_run_that_ended_early_says_what_would_end_it_again(place):
    early = ("training.early_stopping_evals=1", "training.early_stopping_improvement=9")
    changes = ("run.name=early", "training.eval_every_steps=2", *early)
    assert train(settings_of(Path(), Path("model"), *changes), StopAtStep(NEVER)).ending is Ending.PLATEAU
    with pytest.raises(UsageError, match=r"ended early, as training\.early_stopping_evals says") as caught:
        longer(run="early")
    assert "--set training.early_stopping_evals=0 --allow-change training" in caught.value.hint
    outcome, _ = resume(
        "training.max_steps=16",
        "training.early_stopping_evals=0",
        allowed=(*STEPS, "training.early_stopping_evals"),
        run="early",
    )
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, NEW_END)


def test_an_allowed_change_stays_when_the_run_goes_on_again(place):
    train(settings_of(Path(), Path("model"), "run.name=cut"), StopAtStep(4))
    changed = "training.learning_rate=0.02"
    resume(changed, allowed=("training.learning_rate",), flag=StopAtStep(7), run="cut")
    outcome, events = resume(run="cut")
    assert outcome.ending is Ending.FINISHED
    assert not texts(events, Warned)
