"""What may change between a run and its resumption, and what is said about the rest."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sftcli import storage
from sftcli.config.resolve import parse_set
from sftcli.errors import DataError, MismatchError, NotFoundError, OutputError, StorageError, UsageError
from sftcli.events import Ending, Notice, Session, Warned
from sftcli.modeling.formats.sizes import parameters_bytes
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.services.train.resuming.changes import CHANGEABLE, FIXED, FIXED_SECTIONS, Changes
from sftcli.services.train.resuming.compatibility import compare
from sftcli.services.train.resuming.resume_point import choose_checkpoint
from sftcli.services.train.start.disk_space import check_space, checkpoint_bytes
from sftcli.training.checkpoint.format import read_fingerprints
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.forged import forge_fingerprints
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, copied_here, numbers_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER = 99


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 7, with checkpoints 6 and 7."""
    folder = tmp_path_factory.mktemp("stopped")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(settings_of(Path(), Path("model"), "run.name=exp"), StopAtStep(7))
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    return copied_here(origin, tmp_path, monkeypatch)


def resume(place: Path, **changes):
    flag = StopAtStep(NEVER)
    values = {"root": place / "runs", "run": "exp"}
    return resume_training(ResumeRequest(**(values | changes)), Session(flag, flag)), flag.events


def texts(events, kind) -> str:
    return "\n".join(event.text for event in events if isinstance(event, kind))


def test_edited_row_is_refused_and_both_hashes_are_shown(place):
    rows = place / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 6.", "It is 7."))
    with pytest.raises(
        MismatchError, match=r"data was sha256 [0-9a-f]{12}, is sha256 [0-9a-f]{12}"
    ) as caught:
        resume(place)
    assert caught.value.exit_code == 78


def test_appended_row_is_refused_and_the_counts_are_shown(place):
    with (place / "rows.jsonl").open("a") as file:
        file.write('{"question": "One more?", "answer": "Yes."}\n')
    with pytest.raises(MismatchError, match=r"data rows was \d+ \+ \d+ held out, is"):
        resume(place)


def test_touched_data_is_the_same_data(place):
    os.utime(place / "rows.jsonl", (1, 1))
    assert resume(place)[0].ending is Ending.FINISHED


def test_another_template_is_refused(place):
    template = place / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(MismatchError, match="tokenizer and template was"):
        resume(place)


def test_other_weights_of_the_start_model_are_refused(place):
    build_tiny_model(place / "model", seed=1)
    with pytest.raises(MismatchError, match="model was sha256"):
        resume(place)


def test_another_learning_rate_is_refused_by_name_with_both_values(place):
    with pytest.raises(MismatchError, match=r"training\.learning_rate was 0\.01, is 0\.02"):
        resume(place, overrides=(parse_set("training.learning_rate=0.02"),))


def test_every_setting_is_either_changeable_or_refused(origin):
    checkpoint = list_checkpoints(origin / "runs" / "exp" / "checkpoints")[-1]
    then = read_fingerprints(checkpoint)
    keys = [name for name in then if name.startswith("setting ")]
    assert len(keys) > 25
    for key in keys:
        now = then | {key: "another"}
        if key.removeprefix("setting ") in CHANGEABLE:
            assert list(compare(checkpoint, now).harmless) == [key.removeprefix("setting ")]
        else:
            with pytest.raises(MismatchError, match=key.removeprefix("setting ")):
                compare(checkpoint, now)
    assert {f"setting {key}" for key in CHANGEABLE} <= set(keys)


def test_setting_that_is_newer_than_the_run_has_its_default(place):
    checkpoint = list_checkpoints(place / "runs" / "exp" / "checkpoints")[-1]
    now = read_fingerprints(checkpoint)
    forge_fingerprints(checkpoint, lambda stored: stored.pop("setting data.ignored_keys"))
    assert compare(checkpoint, now) == Changes()
    with pytest.raises(MismatchError, match=r"data\.ignored_keys was \[\], is"):
        compare(checkpoint, now | {"setting data.ignored_keys": '["label"]'})


@pytest.mark.parametrize("key", ["training.learning_rate", "data"])
def test_change_that_the_user_allows_is_warned_of_and_recorded(place, key):
    if key == "data":
        rows = place / "rows.jsonl"
        rows.write_text(rows.read_text().replace("It is 6.", "It is 7."))
        overrides = ()
    else:
        overrides = (parse_set(f"{key}=0.02"),)
    with pytest.raises(MismatchError) as caught:
        resume(place, overrides=overrides)
    assert f"--allow-change {key}" in caught.value.hint
    outcome, events = resume(place, overrides=overrides, allowed=(key,))
    assert outcome.ending is Ending.FINISHED
    assert f"{key} was " in texts(events, Warned)
    assert "as allowed: the result differs from an uninterrupted run" in texts(events, Warned)
    (entry,) = json.loads((place / "runs" / "exp" / "run.json").read_text())["resumed"]
    assert list(entry["allowed"]) == [key]
    assert entry["changes"] == {}


def test_change_of_what_the_weights_fit_to_cannot_be_allowed_and_a_misspelled_key_is_told(place):
    for key in (*FIXED, "model.name"):
        with pytest.raises(UsageError, match="cannot change"):
            resume(place, allowed=(key,))
    with pytest.raises(UsageError, match="unknown key") as caught:
        resume(place, allowed=("training.learning_rte",))
    assert "training.learning_rate" in caught.value.hint
    assert FIXED_SECTIONS


def test_another_library_or_device_is_warned_of_with_both_values_and_recorded(place):
    def remember(stored):
        stored |= {"machine device": "cuda", "machine torch": "9.9.9"}
        del stored["machine cpu capability"]

    forge_fingerprints(list_checkpoints(place / "runs" / "exp" / "checkpoints")[-1], remember)
    outcome, events = resume(place)
    assert outcome.ending is Ending.FINISHED
    (told,) = [event.text for event in events if isinstance(event, Warned) and "bit for bit" in event.text]
    assert "device was cuda, is cpu" in told
    assert f"torch was 9.9.9, is {torch.__version__}" in told
    assert "capability" not in told  # the checkpoint does not know it
    (entry,) = json.loads((place / "runs" / "exp" / "run.json").read_text())["resumed"]
    assert entry["machine"]["device"] == ["cuda", "cpu"]
    assert outcome.changed["machine"]["device"] == ("cuda", "cpu")


def test_changeable_setting_is_told_and_recorded(place):
    outcome, events = resume(place, overrides=(parse_set("checkpoint.keep_last=5"),))
    assert outcome.ending is Ending.FINISHED
    assert "checkpoint.keep_last was 2, is 5 from here on" in texts(events, Notice)
    (entry,) = json.loads((place / "runs" / "exp" / "run.json").read_text())["resumed"]
    assert entry["step"] == 7
    assert entry["changes"] == {"checkpoint.keep_last": ["2", "5"]}


def test_damaged_newest_checkpoint_is_named_and_the_older_one_taken(place):
    run = RunFolder(place / "runs" / "exp")
    (run.checkpoints / "step-00000007" / "optimizer.safetensors").write_bytes(b"x")
    outcome, events = resume(place)
    assert outcome.ending is Ending.FINISHED
    assert "step-00000007/optimizer.safetensors has 1 bytes" in texts(events, Warned)
    assert "resuming from step 6" in texts(events, Warned)
    assert [e["step"] for e in numbers_of(run.path) if e["event"] == "StepDone"] == list(range(1, 11))


def test_checkpoint_that_was_asked_for_never_falls_back(place):
    (place / "runs" / "exp" / "checkpoints" / "step-00000007" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="has 1 bytes"):
        resume(place, step=7)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "config.json", "tokenizer.json", "model.safetensors", "optimizer.safetensors",
     "rng.safetensors"],
)  # fmt: skip
def test_missing_file_of_a_checkpoint_that_was_asked_for_is_named_and_nothing_changes(place, name):
    checkpoints = place / "runs" / "exp" / "checkpoints"
    (checkpoints / "step-00000007" / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    with pytest.raises(NotFoundError, match=re.escape(name)) as caught:
        resume(place, step=7)
    assert caught.value.exit_code == 66
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")} == before


def test_unknown_step_lists_the_known_ones(place):
    with pytest.raises(NotFoundError) as caught:
        resume(place, step=5)
    assert caught.value.hint == "it has: 6, 7"


def test_half_written_checkpoint_of_a_killed_save_is_removed_with_a_word_and_strangers_stay(place):
    checkpoints = place / "runs" / "exp" / "checkpoints"
    storage.scratch_path(checkpoints, storage.TEMPORARY, "step-00000009").mkdir()
    (checkpoints / ".tmp-step-00000008-abcd0123").mkdir()  # as earlier versions called it
    (checkpoints / ".trash-step-00000003-abcd0123").mkdir()
    (checkpoints / ".tmp-precious").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    _, events = resume(place)
    assert "removed step-00000008, step-00000009: incomplete, from a save that was killed" in texts(
        events, Notice
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        ".tmp-precious",
        "notes.txt",
        "step-00000009",
        "step-00000010",
    ]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_of_the_logs_is_cut_off(place, cut):
    run = place / "runs" / "exp"
    for name in ("events.jsonl", "training.log"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content + content.splitlines(keepends=True)[-1][:-cut][:-1])
    resume(place)
    lines = (run / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines]
    assert [e["step"] for e in numbers_of(run) if e["event"] == "StepDone"] == list(range(1, 11))


def test_train_into_an_existing_run_is_refused_and_auto_goes_on_with_it(place):
    resolved = settings_of(Path(), Path("model"), "run.name=exp")
    with pytest.raises(OutputError, match="exists already") as caught:
        train(resolved, StopAtStep(NEVER))
    assert "sft resume exp" in caught.value.hint
    flag = StopAtStep(NEVER)
    assert train(resolved, flag, auto=True).ending is Ending.FINISHED
    again = train(resolved, StopAtStep(NEVER), auto=True)
    assert (again.ending, again.step) == (Ending.FINISHED, 10)


def test_auto_with_other_settings_is_refused(place):
    resolved = settings_of(Path(), Path("model"), "run.name=exp", "training.seed=5")
    with pytest.raises(MismatchError, match=r"training\.seed was 0, is 5"):
        train(resolved, StopAtStep(NEVER), auto=True)


def test_auto_takes_a_folder_that_was_made_by_a_killed_start_and_no_other(place):
    resolved = settings_of(Path(), Path("model"), "run.name=new")
    (place / "runs" / "new").mkdir()
    (place / "runs" / "new" / "config.toml").write_text("half")
    assert train(resolved, StopAtStep(NEVER), auto=True).ending is Ending.FINISHED
    (place / "runs" / "thesis").mkdir()
    (place / "runs" / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds chapter\.txt"):
        train(settings_of(Path(), Path("model"), "run.name=thesis"), StopAtStep(NEVER), auto=True)


def test_run_that_was_taken_over_stops_before_it_saves(place):
    class TakeOver(StopAtStep):
        def __call__(self, event):
            super().__call__(event)
            if type(event).__name__ == "StepDone":
                (place / "runs" / "exp" / ".lock").unlink(missing_ok=True)

    flag = TakeOver(NEVER)
    with pytest.raises(StorageError, match="no longer owns"):
        resume_training(ResumeRequest(root=place / "runs", run="exp"), Session(flag, flag))
    assert [step_of(path) for path in list_checkpoints(place / "runs" / "exp" / "checkpoints")] == [6, 7]


def test_run_whose_folder_is_removed_in_training_ends_with_that_and_the_same_command_makes_it_again(place):
    run = place / "runs" / "exp"

    class Remover(StopAtStep):
        def __call__(self, event):
            super().__call__(event)
            if type(event).__name__ == "StepDone":
                shutil.rmtree(run, ignore_errors=True)

    flag = Remover(NEVER)
    with pytest.raises(StorageError, match=r"the folder of run exp is gone: .*runs/exp") as caught:
        resume_training(ResumeRequest(root=place / "runs", run="exp"), Session(flag, flag))
    assert "put it back" in caught.value.hint
    assert [path.name for path in run.parent.iterdir()] == []
    outcome = train(settings_of(Path(), Path("model"), "run.name=exp"), StopAtStep(NEVER), auto=True)
    assert outcome.final is not None


@pytest.mark.parametrize(("share", "fits"), [(0.9, False), (1.1, True)])
def test_room_for_the_checkpoints_is_checked_before_the_model_is_loaded(place, monkeypatch, share, fits):
    run, sink = RunFolder(place / "runs" / "exp"), RecordingSink()
    settings = settings_of(Path(), Path("model")).settings
    one = checkpoint_bytes(settings, place / "model")
    free = int(one * share)  # three may exist at once, two are there
    usage = shutil.disk_usage(place)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if fits:
        check_space(run, one, settings.checkpoint, sink)
        assert len(sink.of(Warned)) == 1
    else:
        with pytest.raises(StorageError, match="free; checkpoints of this model need"):
            check_space(run, one, settings.checkpoint, sink)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ("training.train_embeddings=true", 1.1),
        ("training.train_embeddings=false", 1.2),  # what is frozen may be stored in bfloat16
        ("training.optimizer=adafactor", 1.1),
        ("adapter.kind=lora", 1.6),  # as if it sat on the embeddings as well, which are most of a tiny model
    ],
)
def test_room_that_is_asked_for_is_what_a_checkpoint_takes(place, change, most):
    name = re.sub(r"\W", "-", change)
    resolved = settings_of(Path(), Path("model"), f"run.name={name}", "training.max_steps=1", change)
    asked = checkpoint_bytes(resolved.settings, place / "model")
    train(resolved, StopAtStep(NEVER))
    folder = place / "runs" / name / "checkpoints" / "step-00000001"
    taken = sum(
        tensor.nbytes
        for file in folder.glob("*.safetensors")
        if file.name != "rng.safetensors"
        for tensor in load_file(file).values()
    )
    assert 0.99 * taken <= asked <= most * taken


def test_size_of_the_parameters_is_read_from_the_headers(place):
    tensors = load_file(place / "model" / "model.safetensors")
    assert parameters_bytes(place / "model") == sum(4 * tensor.numel() for tensor in tensors.values())


def test_no_checkpoint_yet_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="has no checkpoint yet"):
        choose_checkpoint(RunFolder(tmp_path), None, RecordingSink())
    assert storage.sweep(tmp_path) == []


@pytest.mark.parametrize("root", ["rows.jsonl", "rows.jsonl/deeper"])
def test_root_that_is_a_file_is_refused_before_anything_else(place, root):
    resolved = settings_of(Path(), Path("no such model"), f"run.root={root}")
    with pytest.raises(OutputError, match="cannot write rows") as caught:
        train(resolved, StopAtStep(NEVER))
    assert caught.value.exit_code == 73


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a\0b", "", ".", "..", "a/b", "-x", ".hidden", "x" * 65, "a b"]
)
def test_name_of_a_run_cannot_leave_the_folder_of_runs(place, name):
    from sftcli.config.layers import Override
    from sftcli.config.resolve import resolve
    from sftcli.errors import UsageError

    with pytest.raises(UsageError):
        resolve(
            preset=None,
            config_file=None,
            environ={},
            overrides=(Override(key="run.name", value=name, origin="--run"),),
        )


@pytest.mark.parametrize("fault", ["once", "twice"])
def test_save_that_fails_once_is_a_warning_and_twice_in_a_row_an_error(place, monkeypatch, fault):
    import errno

    from tests.support.faulty_disk import CountingDisk

    class Away(CountingDisk):
        def create(self, path):
            failing = ("step-00000003",) if fault == "once" else ("step-00000003", "step-00000006")
            if any(step in str(path) for step in failing):
                raise OSError(errno.EACCES, "Permission denied", str(path))
            return super().create(path)

    monkeypatch.setattr(storage, "disk", Away())
    flag = StopAtStep(NEVER)
    resolved = settings_of(Path(), Path("model"), "run.name=flaky")
    if fault == "once":
        assert train(resolved, flag).ending is Ending.FINISHED
        assert "could not save the checkpoint of step 3" in texts(flag.events, Warned)
        assert "training continues" in texts(flag.events, Warned)
    else:
        with pytest.raises(StorageError, match="could not save the checkpoint of step 6"):
            train(resolved, flag)


def test_weights_that_are_not_finite_are_not_saved():
    import torch

    from sftcli.config.schema.training import TrainingSettings
    from sftcli.errors import DivergedError
    from tests.support.recording import MemoryStore
    from tests.support.training import build_trainer

    store = MemoryStore()
    trainer = build_trainer(
        settings=TrainingSettings(max_steps=2, warmup_steps=0), store=store, emit=RecordingSink()
    )
    trainer.take_step()
    with torch.no_grad():
        trainer.weights.masters["model.norm.weight"][0] = float("nan")
    with pytest.raises(DivergedError, match=r"step 1 is not saved: model\.norm\.weight"):
        trainer.save()
    assert store.snapshots == {}
