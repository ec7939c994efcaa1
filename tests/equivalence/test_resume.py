"""The law of resuming: a run that is stopped after any step and resumed leaves what an uninterrupted one leaves."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sftcli import storage
from sftcli.errors import StoppedError
from sftcli.events import Ending, HeldoutDone, Session
from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.forged import forge_random_state
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

STEPS = 10
NEVER = STEPS + 1
ADAPTER = ("adapter.rank=4", "adapter.dropout=0.2")
FORMS = {"full": (), "lora": ("adapter.kind=lora", *ADAPTER), "dora": ("adapter.kind=dora", *ADAPTER)}
PACKED = {f"{form}-packing-{packing}": (*FORMS[form], f"training.packing={packing}")
          for form in ("full", "lora") for packing in ("on", "off")}  # fmt: skip
FORMS |= PACKED | {"dft": ("training.loss=dft",)}
CASES = (
    [("full", k) for k in range(STEPS + 1)]
    + [("lora", k) for k in range(STEPS + 1)]
    + [("dora", 4), ("dft", 4)]
)
ALL_CASES = [
    *CASES,
    *(pytest.param(form, k, marks=pytest.mark.slow) for form in PACKED for k in range(STEPS + 1)),
]
CONTROLS = ["full", "lora", *(pytest.param(form, marks=pytest.mark.slow) for form in PACKED)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder with rows, a tiny model with dropout and an uninterrupted run, with a cache of its own."""
    folder = tmp_path_factory.mktemp("law")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model", dropout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        outcome = train(settings_of(folder, folder / "model", "run.name=whole"), StopAtStep(NEVER))
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, STEPS)
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def uninterrupted(place: Path, form: str) -> Path:
    """Return the run that was never stopped, made when it is first asked for."""
    if form == "full":
        return place / "runs" / "whole"
    if not (place / "runs" / form).exists():
        train(settings_of(place, place / "model", f"run.name={form}", *FORMS[form]), StopAtStep(NEVER))
    return place / "runs" / form


def stop_and_resume(place: Path, stop_at: int, form: str) -> Path:
    """Stop a run after step ``stop_at`` and go on with it from another random state."""
    name = f"{form}-cut-{stop_at}"
    resolved = settings_of(place, place / "model", f"run.name={name}", *FORMS[form])
    if stop_at == 0:
        with pytest.raises(StoppedError):
            train(resolved, StopAtStep(0))
    else:
        train(resolved, StopAtStep(stop_at))
    torch.manual_seed(12345)
    flag = StopAtStep(NEVER)
    outcome = resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, STEPS)
    return place / "runs" / name


@pytest.mark.parametrize(("form", "stop_at"), ALL_CASES)
def test_stopped_after_any_step_and_resumed_equals_uninterrupted_bit_for_bit(place, form, stop_at):
    whole, cut = uninterrupted(place, form), stop_and_resume(place, stop_at, form)
    assert tensors_of(cut, STEPS) == tensors_of(whole, STEPS)
    finals = [
        {path.name: path.read_bytes() for path in run.glob("final/*.safetensors")} for run in (cut, whole)
    ]
    assert len(finals[0]) == 1
    assert finals[0] == finals[1]
    assert numbers_of(cut) == numbers_of(whole)
    assert [event["step"] for event in numbers_of(cut) if event["event"] == "StepDone"] == list(
        range(1, STEPS + 1)
    )


@pytest.mark.parametrize("form", CONTROLS)
def test_law_fails_when_one_random_generator_is_not_restored(place, form):
    name = f"{form}-forgetful"
    train(settings_of(place, place / "model", f"run.name={name}", *FORMS[form]), StopAtStep(4))
    newest = list_checkpoints(place / "runs" / name / "checkpoints")[-1]
    forge_random_state(newest, torch=torch.Generator().manual_seed(12345).get_state())
    flag = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    run, whole = place / "runs" / name, uninterrupted(place, form)
    weights = "model.safetensors" if form.startswith("full") else "adapter_model.safetensors"
    assert tensors_of(run, STEPS)[weights] != tensors_of(whole, STEPS)[weights]
    assert numbers_of(run) != numbers_of(whole)


def test_the_checkpoint_that_a_run_goes_on_from_is_hashed_once(place, monkeypatch):
    name = "hashed"
    train(settings_of(place, place / "model", f"run.name={name}"), StopAtStep(7))
    read, hashed = storage.file_sha256, []
    monkeypatch.setattr(storage, "file_sha256", lambda path: hashed.append(path) or read(path))
    flag = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    weights = place / "runs" / name / "checkpoints" / "step-00000007" / "model.safetensors"
    assert hashed.count(weights) == 1


def test_resume_from_an_older_checkpoint_takes_the_later_ones_out_and_ends_the_same(place):
    name = "older"
    train(settings_of(place, place / "model", f"run.name={name}"), StopAtStep(7))
    run, flag = place / "runs" / name, StopAtStep(NEVER)
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [6, 7]
    resume_training(ResumeRequest(root=place / "runs", run=name, step=6), Session(flag, flag))
    assert tensors_of(run, STEPS) == tensors_of(place / "runs" / "whole", STEPS)
    assert numbers_of(run) == numbers_of(place / "runs" / "whole")


class StopsAgain(StopAtStep):
    """Raised as soon as a held-out loss was measured; the process that it stops can be killed before it has saved it."""

    def __init__(self, kills: bool) -> None:
        super().__init__(NEVER)
        self.kills = kills

    def __call__(self, event, /) -> None:
        super().__call__(event)
        if isinstance(event, HeldoutDone):
            self.is_raised = True
            if self.kills:
                raise KeyboardInterrupt


def measured_again(place: Path, name: str, *, kills: bool) -> Path:
    run = place / "runs" / name
    for _ in range(3 if kills else 1):
        flag = StopsAgain(kills)
        with suppress(KeyboardInterrupt):
            resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    return run


@pytest.mark.parametrize("kills", [False, True], ids=["stopped", "killed"])
def test_a_held_out_loss_that_was_owed_stands_once_in_the_log_and_is_saved(place, kills):
    name, flag = f"owed-{kills}", StopAtStep(NEVER)
    train(settings_of(place, place / "model", f"run.name={name}"), StopAtStep(8))
    run = measured_again(place, name, kills=kills)
    assert [event["step"] for event in numbers_of(run) if event["event"] == "HeldoutDone"] == [0, 4, 8]
    owing = read_snapshot(run / "checkpoints" / "step-00000008").state.last_heldout_step
    assert owing == (4 if kills else 8)
    resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    whole = place / "runs" / "whole"
    assert numbers_of(run) == numbers_of(whole)
    assert state_of(run) == state_of(whole)


def state_of(run: Path):
    return read_snapshot(run / "checkpoints" / f"step-{STEPS:08d}").state


def test_a_held_out_loss_that_was_owed_at_the_last_step_is_in_its_checkpoint(place):
    name, flag = "owed-last", StopAtStep(NEVER)
    train(settings_of(place, place / "model", f"run.name={name}"), StopAtStep(STEPS))
    run = place / "runs" / name
    assert state_of(run).last_heldout_step == 8
    resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    assert state_of(run) == state_of(place / "runs" / "whole")
    assert numbers_of(run) == numbers_of(place / "runs" / "whole")


@pytest.mark.parametrize("form", ["full", "lora"])
def test_verify_replays_between_two_checkpoints_and_writes_nothing(place, form):
    run = uninterrupted(place, form)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    flag = StopAtStep(NEVER)
    proved = verify_resume(ResumeRequest(root=place / "runs", run=run.name), Session(flag, flag))
    assert (proved.first, proved.second) == (9, 10)
    assert proved.tensors > 50
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
