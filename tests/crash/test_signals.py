"""A signal at every moment at which a command looks for one, and during a save: it stops, keeps what it has, and goes on later."""

import signal
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.cli.options.shared import Output
from sftcli.cli.session.session import session
from sftcli.cli.session.signals import CommandStopped
from sftcli.events import CheckpointSaved, Ending, HeldoutDone, Session, StepDone, fan_out
from sftcli.services.train.lead import TrainRequest, run_training
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.faulty_disk import CountingDisk
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

STEPS = 4
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 75}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_rows(folder / "rows.jsonl", 15)
    build_tiny_model(folder / "model", dropout=0.1)
    train(settings(folder, "whole"), StopAtStep(99))
    return folder


def settings(place: Path, name: str, every: str = "0"):
    """Saves are in the foreground, so that a test says at which operation of one a signal comes."""
    return settings_of(
        place,
        place / "model",
        f"run.name={name}",
        f"training.max_steps={STEPS}",
        "training.eval_every_steps=2",
        "checkpoint.in_background=false",
        f"checkpoint.every_steps={every}",
    )


class Questions:
    """A stop flag that passes questions on and sends a signal before answering one of them."""

    def __init__(self, flag, at: int = 0, name: str = "SIGTERM") -> None:
        self.flag, self.at, self.name, self.count = flag, at, name, 0

    def requested(self) -> bool:
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.Signals[self.name])
        return self.flag.requested()

    def save_requested(self) -> bool:
        return self.flag.save_requested()


def train_in_session(
    place: Path, name: str, *, at: int = 0, signal_name: str = "SIGTERM", sink=None, every: str = "3"
):
    """Return exit code, whether anything ran to its end, the sink, and how often a stop was looked for."""
    sink = sink or RecordingSink()
    questions = 0
    try:
        with session(Output(quiet=True)) as current:
            emit, stop = current.emit, current.stop
            flag = Questions(stop, at, signal_name)
            request = TrainRequest(resolved=settings(place, name, every), label="x", command="sft train")
            try:
                outcome = run_training(request, Session(fan_out(sink, emit), flag))
            finally:
                questions = flag.count
        code = 0 if outcome.ending is Ending.FINISHED else stop.exit_code
    except CommandStopped as error:
        code = error.exit_code
        sink.end = str(error)
    return code, sink, questions


def assert_goes_on_to_the_same_end(place: Path, name: str) -> None:
    assert train(settings(place, name), StopAtStep(99), auto=True).ending is Ending.FINISHED
    assert tensors_of(place / "runs" / name, STEPS) == tensors_of(place / "runs" / "whole", STEPS)
    assert numbers_of(place / "runs" / name) == numbers_of(place / "runs" / "whole")


def test_signal_at_every_look_for_one_saves_what_there_is_and_the_run_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "count"))
    _, _, total = train_in_session(place, "count")
    phases = set()
    for at in range(1, total + 1):
        monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / str(at)))  # so that preparing is cut as well
        name = f"cut-{at}"
        code, sink, _ = train_in_session(place, name, at=at)
        steps = len(sink.of(StepDone))
        saved = list_checkpoints(place / "runs" / name / "checkpoints")
        if code == 0:
            phases.add("too late")
            assert steps == STEPS
        else:
            phases.add((steps, len(sink.of(HeldoutDone))))
            assert code == 143
            assert [step_of(path) for path in saved[-1:]] == ([steps] if steps else [])
        assert_goes_on_to_the_same_end(place, name)
    assert total >= 11
    assert len(phases) >= 6


@pytest.mark.parametrize("name", CODES)
def test_each_signal_has_its_exit_code_and_saves(place, name):
    run = f"signal-{name}"

    class Sink(RecordingSink):
        def __call__(self, event):
            super().__call__(event)
            if isinstance(event, StepDone) and event.step == 2:
                signal.raise_signal(signal.Signals[name])

    code, sink, _ = train_in_session(place, run, sink=Sink())
    assert code == CODES[name]
    assert len(sink.of(StepDone)) == 2
    assert [event.step for event in sink.of(CheckpointSaved)] == [2]


@pytest.mark.parametrize(
    ("name", "saves", "told"),
    [
        ("none", "0", "no checkpoint was saved yet; to start it over: sft resume"),
        ("one", "1", "step 1 is saved; to go on from there: sft resume"),
    ],
)
def test_two_interrupts_say_what_is_saved(place, name, saves, told):
    class Sink(RecordingSink):
        def __call__(self, event):
            super().__call__(event)
            if isinstance(event, StepDone) and event.step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    code, sink, _ = train_in_session(place, f"twice-{name}", sink=Sink(), every=saves)
    assert code == 130
    assert told in sink.end
    assert_goes_on_to_the_same_end(place, f"twice-{name}")


def test_usr2_saves_and_goes_on(place):
    class Sink(RecordingSink):
        def __call__(self, event):
            super().__call__(event)
            if isinstance(event, StepDone) and event.step == 1:
                signal.raise_signal(signal.SIGUSR2)

    code, sink, _ = train_in_session(place, "usr2", sink=Sink())
    assert code == 0
    assert [event.step for event in sink.of(CheckpointSaved)] == [1, 3, 4]
    assert numbers_of(place / "runs" / "usr2") == numbers_of(place / "runs" / "whole")


class SignallingDisk(CountingDisk):
    """Sends signals at the moment at which the weights of step 3 are about to be written."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def create(self, path):
        if path.name == "model.safetensors" and "step-00000003" in str(path):
            times, self.times = self.times, 0
            for _ in range(times):
                signal.raise_signal(signal.SIGTERM)
        return super().create(path)


def test_signal_during_a_save_lets_it_finish(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", SignallingDisk(1))
        code, _, _ = train_in_session(place, "saving")
    assert code == 143
    assert [step_of(path) for path in list_checkpoints(place / "runs" / "saving" / "checkpoints")] == [3]
    assert_goes_on_to_the_same_end(place, "saving")


def test_second_signal_during_a_save_ends_at_once_and_loses_only_that_save(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", SignallingDisk(2))
        code, sink, _ = train_in_session(place, "impatient")
    assert code == 143
    assert sink.of(CheckpointSaved) == []
    assert list_checkpoints(place / "runs" / "impatient" / "checkpoints") == []
    assert_goes_on_to_the_same_end(place, "impatient")


def test_signal_while_an_answer_is_generated_ends_it_after_the_token(place):
    from sftcli.config.schema.run import SamplingSettings
    from sftcli.events import TextDelta
    from sftcli.services.generate.prompt import run_generation
    from sftcli.services.generate.request import GenerateRequest

    def interrupt(event):
        if isinstance(event, TextDelta):
            signal.raise_signal(signal.SIGINT)

    with session(Output(quiet=True)) as current:
        stop = current.stop
        request = GenerateRequest(
            prompt="What is 7 plus 7?", sampling=SamplingSettings(max_new_tokens=400, temperature=2.0), root=place,
            precision="fp32", checkpoint=str(place / "runs" / "whole" / "final"),
        )  # fmt: skip
        answer = run_generation(request, lambda event: None if stop.requested() else interrupt(event), stop)
    assert stop.exit_code == 130
    assert 0 < answer[0].new_tokens < 400
