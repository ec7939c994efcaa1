"""A run that is taken back to an earlier checkpoint loses none of the later ones before it has a newer one, whenever it is killed."""

import shutil
import signal
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.events import Ending, FitStarted, Session
from sftcli.services.models.choose import choose_model
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.summary import RunState, summarize_run
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.checkpoint.format import read_snapshot, verify
from sftcli.training.checkpoint.names import list_checkpoints, list_set_aside, step_of
from tests.support.faulty_disk import CountingDisk, KillingDisk
from tests.support.forked import run_forked
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, copied_here, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER, STEPS = 99, 6
KEPT = (2, 4, 5)  # checkpoints of the stopped run


class StopBeforeStep(StopAtStep):
    """Stops when the checkpoint is loaded and no step is taken yet."""

    def __call__(self, event) -> None:
        super().__call__(event)
        self.is_raised |= isinstance(event, FitStarted)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one kind: ``half`` was stopped after step 5, ``whole`` is finished."""
    folder = tmp_path_factory.mktemp("taken-back")
    write_rows(folder / "rows.jsonl", 15)
    build_tiny_model(folder / "model", dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        for name, stop in (("half", 5), ("whole", NEVER)):
            changes = (f"run.name={name}", f"training.max_steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=4",
                       "checkpoint.in_background=false", "training.eval_every_steps=0")  # fmt: skip
            train(settings_of(Path(), Path("model"), *changes), StopAtStep(stop))
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_here(origin, tmp_path, monkeypatch)


def resume(run: RunFolder, step: int | None = None, flag: StopAtStep | None = None):
    flag = flag or StopAtStep(NEVER)
    return resume_training(ResumeRequest(root=run.path.parent, run=run.name, step=step), Session(flag, flag))


def whole_steps(run: RunFolder) -> dict[int, list[Path]]:
    """Return the checkpoints in use and set aside, each of them verified."""
    found: dict[int, list[Path]] = {}
    for path in [*list_checkpoints(run.checkpoints), *list_set_aside(run.checkpoints)]:
        verify(path)
        assert read_snapshot(path).state.step == step_of(path)
        found.setdefault(step_of(path), []).append(path)
    return found


def test_later_checkpoints_stay_until_a_newer_one_is_safe_and_can_be_brought_back(place):
    run = RunFolder(place / "runs" / "half")
    assert resume(run, 2, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    assert [step_of(path) for path in list_checkpoints(run.checkpoints)] == [2]
    assert [step_of(path) for path in list_set_aside(run.checkpoints)] == [4, 5]
    assert summarize_run(run).set_aside == (4, 5)
    assert (
        resume(run, None, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    )  # the plain command goes on from 2
    assert sorted(whole_steps(run)) == [2, 4, 5]
    assert resume(run, 4, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    assert [step_of(path) for path in list_checkpoints(run.checkpoints)] == [2, 4]
    assert [step_of(path) for path in list_set_aside(run.checkpoints)] == [5]
    assert resume(run).ending is Ending.FINISHED
    assert list_set_aside(run.checkpoints) == []
    assert {path.name for path in run.checkpoints.iterdir()} == {f"step-0000000{step}" for step in (2, 4, 6)}
    assert tensors_of(run.path, STEPS) == tensors_of(place / "runs" / "whole", STEPS)


def test_finished_run_that_was_taken_back_is_unfinished_everywhere(place):
    run = RunFolder(place / "runs" / "whole")
    final = (run.final / "model.safetensors").read_bytes()
    run.evaluation.write_text("{}")
    assert resume(run, 4, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    assert not run.is_finished
    assert summarize_run(run).state is RunState.STOPPED
    chosen = choose_model("whole", root=place / "runs", emit=RecordingSink())
    assert chosen.folder == run.checkpoints / "step-00000004"
    assert resume(run).ending is Ending.FINISHED
    assert run.is_finished
    assert (run.final / "model.safetensors").read_bytes() == final
    assert not run.evaluation.exists()  # scores of another training
    assert [path.name for path in run.path.iterdir() if "aside" in path.name] == []


def test_damaged_note_of_what_is_set_aside_loses_nothing(place):
    run = RunFolder(place / "runs" / "half")
    resume(run, 2, StopBeforeStep(NEVER))
    (run.checkpoints / ".taken-back.json").write_bytes(b"{")
    assert resume(run, None, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    assert sorted(whole_steps(run)) == [2, 4, 5]
    assert resume(run, 5, StopBeforeStep(NEVER)).ending is Ending.STOPPED
    assert [step_of(path) for path in list_checkpoints(run.checkpoints)] == [2, 4, 5]
    assert resume(run).ending is Ending.FINISHED


def test_last_checkpoint_of_a_finished_run_ends_it_again(place):
    run = RunFolder(place / "runs" / "whole")
    assert resume(run, STEPS).ending is Ending.FINISHED
    assert run.is_finished


def test_kill_before_each_rename_of_taking_back_and_of_the_next_start_loses_no_checkpoint(place):
    attack(place, "half", {"rename"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "whole"])
def test_kill_before_every_operation_of_taking_back_and_of_the_next_start_loses_no_checkpoint(place, name):
    attack(place, name, None)


def attack(place: Path, name: str, kinds: set[str] | None) -> None:
    """Kill ``resume --checkpoint 2`` at each moment, and the start after it at one more.

    Up to the moment at which a newer checkpoint is whole, each of the old ones has to be there. At the end, the run ends as it
    would have without any of that.
    """
    steps = sorted(whole_steps(RunFolder(place / "runs" / name)))
    golden = tensors_of(place / "runs" / "whole", STEPS)
    log = operations_of_taking_back(place, name)
    moments = [
        number
        for number, (what, path) in enumerate(log, 1)
        if (kinds is None or what in kinds) and (what, path) != (log[number - 2] if number > 1 else None)
    ]
    whole = []
    for turn, at in enumerate(moments):
        run = RunFolder(Path(shutil.copytree(place / "runs" / name, place / "tried" / f"{at}" / name)))
        for step, moment in ((2, at), (None, moments[len(moments) // 2 - turn])):

            def work(run=run, step=step, moment=moment):
                storage.disk = KillingDisk(moment)
                resume(run, step)

            assert run_forked(work) in {0, -signal.SIGKILL}
            whole.append(has_all(run, steps))
        if turn % 20 == 0:
            assert resume(run).ending is Ending.FINISHED
            if not whole[-1] or run.is_finished:
                assert tensors_of(run.path, STEPS) == golden
        shutil.rmtree(run.path.parent)
    assert whole[0]
    assert kinds or False in whole  # after the newer one was safe


def operations_of_taking_back(place: Path, name: str) -> list[tuple[str, str]]:
    """Return the operations of ``resume --checkpoint 2`` up to the end of the first save."""
    run, disk = (
        RunFolder(Path(shutil.copytree(place / "runs" / name, place / "counted" / name))),
        CountingDisk(),
    )
    before, storage.disk = storage.disk, disk
    try:
        resume(run, 2)
    finally:
        storage.disk = before
    saved = [
        number for number, (what, path) in enumerate(disk.log) if what == "create" and path == "manifest.json"
    ]
    return disk.log[: saved[1]]


def has_all(run: RunFolder, steps: list[int]) -> bool:
    """Return whether all of ``steps`` are there; where one is not, a newer one than the run was taken back to has to be."""
    found = whole_steps(run)
    if set(steps) <= set(found):
        return True
    assert max(step for step, paths in found.items() if not paths[0].name.startswith(".")) > 2
    return False
