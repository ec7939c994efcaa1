"""What is decided at the start of a run is written into it, and taken from there whatever a later start would decide."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftcli.config.resolve import parse_set
from sftcli.config.schema.training import Parallel
from sftcli.errors import DataError, MismatchError, ResourceError
from sftcli.events import Ending, ModelLoaded, Notice, Session, StepDone, Warned
from sftcli.services.machine.precision import Precision
from sftcli.services.processes.peers import Peers
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Decisions
from sftcli.services.train import decisions
from sftcli.services.train.decisions import (
    ASKED_BY,
    agree_on_decisions,
    but,
    read_decisions,
    settle_precision,
)
from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume
from sftcli.services.train.resuming.changes import Changes, open_again
from sftcli.services.train.start.parallelism import choose_shards
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.distributed.group import Group
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER, STEPS = 99, 10


def decide(monkeypatch, name: str) -> None:
    monkeypatch.setattr(
        decisions, "decide_precision", lambda setting, device: Precision(name=name, why=f"{name} was drawn")
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bfloat16 that was stopped after step 7, and the same one uninterrupted."""
    folder = tmp_path_factory.mktemp("decided")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model", dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        decide(patch, "bf16")
        train(settings_of(folder, folder / "model", "run.name=whole"), StopAtStep(NEVER))
        train(settings_of(folder, folder / "model", "run.name=cut"), StopAtStep(7))
    return folder


@pytest.fixture
def cut(place: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the run that was stopped, on a machine that would decide for float32 now."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))
    decide(monkeypatch, "fp32")
    return Path(shutil.copytree(place / "runs" / "cut", tmp_path / "cut"))


def resume(run: Path, **changes):
    flag = StopAtStep(NEVER)
    return resume_training(
        ResumeRequest(root=run.parent, run=run.name, **changes), Session(flag, flag)
    ), flag.events


def rewrite(run: Path, change) -> None:
    about = json.loads((run / "run.json").read_text())
    change(about)
    (run / "run.json").write_text(json.dumps(about))


def test_a_start_that_would_decide_otherwise_goes_on_in_the_precision_of_the_run(place, cut):
    outcome, events = resume(cut)
    assert outcome.ending is Ending.FINISHED
    (loaded,) = [event for event in events if isinstance(event, ModelLoaded)]
    assert (loaded.precision, loaded.precision_why) == ("bf16", "as at the start of the run")
    assert tensors_of(cut, STEPS) == tensors_of(place / "runs" / "whole", STEPS)
    assert numbers_of(cut) == numbers_of(place / "runs" / "whole")


@pytest.mark.parametrize(("change", "chosen"), [((), "bf16"), (("training.learning_rate=2e-2",), "fp32")])
def test_a_run_that_starts_over_with_the_same_settings_keeps_what_it_decided(
    place, monkeypatch, tmp_path, change, chosen
):
    settings = settings_of(place, place / "model", "run.name=over", f"run.root={tmp_path}")
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))
    decide(monkeypatch, "bf16")

    class Killed(StopAtStep):
        def __call__(self, event, /) -> None:
            if isinstance(event, StepDone):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, Killed(NEVER))
    decide(monkeypatch, "fp32")
    again = settings_of(place, place / "model", "run.name=over", f"run.root={tmp_path}", *change)
    flag = StopAtStep(1)
    train(again, flag, auto=True)
    assert [event.precision for event in flag.events if isinstance(event, ModelLoaded)] == [chosen]


def test_verify_replays_in_the_precision_of_the_run(place, cut):
    flag = StopAtStep(NEVER)
    assert verify_resume(ResumeRequest(root=place / "runs", run="whole"), Session(flag, flag)).second == STEPS


def test_all_that_was_decided_is_in_the_run_and_stays_as_it_was(cut):
    before = json.loads((cut / "run.json").read_text())["decisions"]
    assert before["precision_why"] == "bf16 was drawn"
    assert None not in before.values()
    resume(cut)
    assert json.loads((cut / "run.json").read_text())["decisions"] == before


def test_a_precision_that_the_user_lets_differ_is_decided_anew(cut):
    overrides = (parse_set("training.precision=fp32"),)
    with pytest.raises(MismatchError, match=r"training\.precision was"):
        resume(cut, overrides=overrides)
    _, events = resume(cut, overrides=overrides, allowed=("training.precision",))
    assert [event.precision for event in events if isinstance(event, ModelLoaded)] == ["fp32"]
    assert json.loads((cut / "run.json").read_text())["decisions"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "value"), [("attention", "eager"), ("layers", ["Other"]), ("packing", "mask"), ("head", "other")]
)
def test_what_cannot_be_decided_again_is_refused_by_name(cut, name, value):
    rewrite(cut, lambda about: about["decisions"].update({name: value}))
    with pytest.raises(MismatchError, match=f"{name} was") as caught:
        resume(cut)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(("name", "value"), [("layers", []), ("packing", "none"), ("head", "whole")])
def test_the_plain_form_of_a_run_is_taken_without_a_try(cut, name, value):
    rewrite(cut, lambda about: about["decisions"].update({name: value}))
    assert resume(cut)[0].ending is Ending.FINISHED
    assert json.loads((cut / "run.json").read_text())["decisions"][name] == value


def test_a_run_of_an_older_version_goes_on_as_it_is_decided_today_and_it_is_said(cut):
    rewrite(cut, lambda about: about.pop("decisions"))
    _, events = resume(cut)
    (sent,) = [event.text for event in events if isinstance(event, Notice) and "older version" in event.text]
    assert "records nothing" in sent
    assert [event.precision for event in events if isinstance(event, ModelLoaded)] == ["fp32"]


def test_of_an_older_run_the_precision_of_its_checkpoint_is_taken(cut):
    rewrite(cut, lambda about: about.pop("decisions"))
    checkpoint = list_checkpoints(cut / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    older = {"fingerprints": {"machine precision of products": "bf16"}}
    (checkpoint / "state.json").write_text(json.dumps(state | older))
    sink = RecordingSink()
    assert read_decisions(RunFolder(cut), checkpoint, sink) == Decisions(precision="bf16")
    assert "only that it runs in bf16" in sink.of(Notice)[0].text


@pytest.mark.parametrize("value", [3, [], {"precision": 1}, {"precision": "fp8"}, {"layers": "all"}])
def test_a_record_that_no_run_has_made_is_refused_with_its_file(cut, value):
    rewrite(cut, lambda about: about.update({"decisions": value}))
    with pytest.raises(DataError, match=r"run\.json"):
        resume(cut)


def test_a_device_that_cannot_do_what_is_recorded_is_refused_with_the_way_out(monkeypatch):
    def cannot(name, device):
        raise ResourceError("this device does not support bfloat16 matrix products")

    monkeypatch.setattr(decisions, "dtype_named", cannot)
    with pytest.raises(ResourceError, match="the run trains in bf16, and this device") as caught:
        settle_precision(Decisions(precision="bf16"), "auto", torch.device("cpu"))
    assert "--allow-change training.precision" in caught.value.hint


COMPLETE = Decisions(
    precision="bf16",
    precision_why="why",
    attention="sdpa",
    layers=("A",),
    packing="none",
    kernel="sdpa padded",
    head="lean",
    weights="whole",
)


def test_every_decision_survives_being_written_down_and_is_asked_for_by_known_settings():
    assert Decisions.from_json(json.loads(json.dumps(COMPLETE.to_json())), where="here") == COMPLETE
    assert set(ASKED_BY) <= set(COMPLETE.to_json())
    assert but(COMPLETE, {"training.packing"}).packing is None
    assert but(COMPLETE, {"training.learning_rate"}) == COMPLETE


class Wire(Peers):
    """Processes that meet in one list of what was broadcast."""

    def __init__(self, rank: int, sent: list) -> None:
        super().__init__(Group(rank=rank, size=2))
        self.sent = sent

    def broadcast(self, value) -> None:
        self.sent.append(json.loads(json.dumps(value)))

    def receive(self, stop):
        return self.sent.pop(0)


def test_of_several_processes_the_first_decides_and_one_that_cannot_follow_is_named():
    sent: list = []
    first, second = (Wire(rank, sent) for rank in range(2))
    assert first.share(lambda: {"precision": "bf16"}) == {"precision": "bf16"}
    assert second.share(lambda: pytest.fail("the first one decides")) == {"precision": "bf16"}
    for packing in ("none", "bounds"):
        agree_on_decisions(COMPLETE, first)
        own = replace(COMPLETE, packing=packing, precision_why="another")
        if packing == "none":
            agree_on_decisions(own, second)
        else:
            with pytest.raises(MismatchError, match=r"process 1 .*packing was none, is bounds"):
                agree_on_decisions(own, second)


@pytest.mark.parametrize(("recorded", "shards"), [(None, 1), ("whole", 1), ("shared", 2)])
def test_by_auto_several_processes_share_the_weights_as_the_run_did(place, recorded, shards):
    settings = settings_of(place, place / "model").settings
    found = choose_shards(
        settings,
        place / "model",
        Group(size=2),
        dtype=torch.float32,
        device=torch.device("cpu"),
        recorded=recorded,
    )
    assert found == shards


def test_another_number_of_processes_or_a_mode_that_was_asked_for_shares_anew(place):
    made = Decisions(precision="bf16", weights="shared")
    training = settings_of(place, place / "model").settings.training
    assert but(made, open_again(Changes(), training)) == made
    assert but(made, open_again(Changes(machine={"processes": ("2", "1")}), training)).weights is None
    ddp = training.model_copy(update={"parallel": Parallel.DDP})
    assert but(made, open_again(Changes(), ddp)).weights is None


def test_weights_that_are_shared_otherwise_than_before_are_told(cut):
    rewrite(cut, lambda about: about["decisions"].update({"weights": "shared"}))
    sink, run = RecordingSink(), RunFolder(cut)
    made = run.record().decisions
    decisions.record_decisions(run, replace(made, weights="whole"), sink)
    assert "weights of the processes were shared, are whole" in sink.of(Warned)[0].text


def test_attention_that_another_kernel_computes_than_before_is_told_and_no_reason_to_refuse(cut):
    rewrite(cut, lambda about: about["decisions"].update({"kernel": "varlen fa3"}))
    outcome, events = resume(cut)
    assert outcome.ending is Ending.FINISHED
    told = [event.text for event in events if isinstance(event, Warned)]
    assert any("attention was computed 'varlen fa3', is 'by document'" in text for text in told)
    assert json.loads((cut / "run.json").read_text())["decisions"]["kernel"] == "by document"
