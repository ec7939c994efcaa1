"""``sft train --compare``: short runs on the same held-out rows, one table, and a comparison that goes on after a kill."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sftcli import storage
from sftcli.cli.results.comparison import comparison_table, finding
from sftcli.errors import MismatchError, OutputError, StoppedError
from sftcli.events import Notice, Session, StepDone
from sftcli.services.compare.record import read_record
from sftcli.services.prepare.prepare import prepare_data
from sftcli.services.prepare.sources import find_sources
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.summary import RunState, summarize_runs
from sftcli.services.runs.trained_rows import prepared_rows_of
from tests.cli.conftest import write_sums
from tests.support.comparing import NEVER, compare, table_of
from tests.support.faulty_disk import CountingDisk
from tests.support.forked import run_forked
from tests.support.runs import StopAtStep, copied_here, settings_of, train
from tests.support.tiny_model import build_tiny_model

ROWS = "rows=25%,50%,100%"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a model, rows, and the comparison ``all`` of three shares of these."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        build_tiny_model(folder / "model")
        write_sums(folder / "rows.jsonl")
        flag = StopAtStep(NEVER)
        report = compare(
            ROWS, "training.precision=fp32", flag=flag
        )  # as scores are; a machine may choose bf16
    return folder, report, flag.events


@pytest.fixture
def place(compared, tmp_path, monkeypatch):
    return copied_here(compared[0], tmp_path, monkeypatch)


def prepared_of(run: Path):
    settings = read_settings(RunFolder(run))
    flag = StopAtStep(NEVER)
    return prepare_data(
        settings.data, find_sources(settings.data), model_folder=Path("model"), seed=settings.rows_seed,
        session=Session(flag, flag),
    ).dataset  # fmt: skip


def test_runs_have_the_same_held_out_rows_and_nested_rows_to_train_on(place):
    datasets = [prepared_of(place / "runs" / "all" / name) for name in ("1-25", "2-50", "3-100")]
    assert len({dataset.fingerprint for dataset in datasets}) == 1
    assert len({tuple(dataset.heldout.origins()) for dataset in datasets}) == 1
    quarter, half, whole = (set(dataset.train.origins()) for dataset in datasets)
    assert quarter < half < whole
    assert [len(quarter), len(half), len(whole)] == [12, 24, 48]
    assert not whole & set(datasets[0].heldout.origins())


def test_what_a_run_has_trained_on_is_its_share(place):
    found = prepared_rows_of(RunFolder(place / "runs" / "all" / "1-25"))
    assert set(found.train.origins()) == set(prepared_of(place / "runs" / "all" / "1-25").train.origins())


def test_runs_differ_in_one_thing_and_train_equally_long(compared):
    folder, report, _ = compared
    settings = [
        read_settings(RunFolder(folder / run)).model_dump(exclude={"run", "sampling"}) for run in report.values[0].runs + report.values[2].runs
    ]  # fmt: skip
    first, last = settings
    assert first["data"].pop("train_share") == 0.25
    assert last["data"].pop("train_share") == 1.0
    assert first == last
    assert [summary.step for summary in summarize_runs(folder / "runs" / "all")] == [6, 6, 6]


def test_slope_and_differences_follow_from_the_rows_that_are_kept(compared):
    folder, report, _ = compared
    scored = read_record(folder / "runs" / "all").scored
    runs = [scored[name] for name in ("1-25", "2-50", "3-100")]
    losses = [sum(run.nll) / sum(run.tokens) for run in runs]
    assert [value.score for value in report.values] == pytest.approx(losses)
    slope, _ = np.polyfit(np.log2([run.train_rows for run in runs]), losses, 1)
    assert report.doubling.value == pytest.approx(slope)
    best = min(losses)
    assert [
        0.0 if value.difference is None else value.difference.value for value in report.values
    ] == pytest.approx([loss - best for loss in losses])


def test_scores_are_those_that_the_run_itself_measured(compared):
    folder, report, _ = compared
    for value, summary in zip(report.values, reversed(summarize_runs(folder / "runs" / "all")), strict=True):
        assert summary.heldout_loss == pytest.approx(value.score, abs=1e-5)


def test_weights_are_removed_and_numbers_stay(compared):
    folder, _, events = compared
    said = [event.text for event in events if isinstance(event, Notice)]
    for summary in summarize_runs(folder / "runs" / "all"):
        assert summary.state is RunState.SCORED
        assert summary.curve
        assert not list(Path(folder, summary.path).rglob("*.safetensors"))
        assert f"{summary.name} is done; its weights are removed, its log stays" in said


def test_the_price_is_said_once_before_the_first_run(compared):
    said = [event.text for event in compared[2] if isinstance(event, Notice)]
    priced = [place for place, text in enumerate(said) if text.startswith("3 runs of 6 steps: about ")]
    begun = [place for place, text in enumerate(said) if text.startswith("run 1 of 3: rows 25%")]
    assert len(priced) == len(begun) == 1
    assert priced < begun


def test_screen_json_list_and_report(sft, compared, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(copied_here(compared[0], tmp_path, monkeypatch) / "cache"))
    command = ["train", "--data", "rows.jsonl", "--model", "model", "--max-steps", "6", "--batch-size", "4", "--lr", "1e-2",
               "--set", "data.heldout_fraction=0.2", "--set", "checkpoint.every_steps=2", "--run", "all", "--compare", ROWS,
               "--set", "checkpoint.in_background=false", "--set", "training.precision=fp32"]  # fmt: skip
    code, _, err = sft(*command)
    assert code == 73
    assert "--resume auto" in err
    code, out, err = sft(*command, "--resume", "auto")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["rows", "25%", "50%", "100%"]
    assert "too few held-out rows to tell: 12" in out
    assert "one seed: how far another seed would move these numbers is not measured" in err
    assert "run 1 of 3" not in err
    code, out, _ = sft(*command, "--resume", "auto", "--json")
    found = json.loads(out)
    assert [value["train_rows"] for value in found["values"]] == [12, 24, 48]
    code, out, _ = sft(*command, "--resume", "auto", "--quiet")
    assert code == 0
    code, _, err = sft(*command, "--resume", "auto", "--seeds", "2")
    assert code == 78
    assert "seeds was 1, is 2" in err
    code, out, err = sft("runs")
    assert "comparison of rows, all: 3 of 3 runs scored" in err
    code, out, _ = sft("runs", "runs/all")
    assert out.count("scored") == 3
    code, _, err = sft("show", "all")
    assert (code, "is a folder of runs, not one run" in err, "sft runs runs/all" in err) == (66, True, True)
    code, out, _ = sft("report", "1-25", "3-100", "--runs", "runs/all", "--out", "page.html")
    assert "3-100" in Path("page.html").read_text(encoding="utf-8")
    code, _, err = sft("resume", "runs/all/1-25")
    assert code == 66
    assert "its weights were removed when it was scored" in err
    code, _, err = sft("eval", "runs/all/1-25")
    assert code == 66
    assert "its weights were removed when it was scored" in err


def test_nothing_is_said_of_what_was_decided_where_all_that_counts_was_given(compared):
    """Epochs are open there, and say nothing beside a number of steps."""
    assert not [
        event.text for event in compared[2] if isinstance(event, Notice) and event.text.startswith("auto:")
    ]


def test_plan_says_runs_and_time_and_writes_nothing(sft, place):
    before = sorted(Path("runs").rglob("*"))
    command = ("train", "--data", "rows.jsonl", "--model", "model", "--max-steps", "6", "--plan")
    code, out, _ = sft(*command, "--compare", ROWS, "--seeds", "2")
    assert code == 0
    assert out.splitlines()[-1].startswith("6 runs of 6 steps: about ")
    assert sorted(Path("runs").rglob("*")) == before


class KillingAtSave(CountingDisk):
    """Stops the machine when a checkpoint of step 4 gets its name the second time: in the second run."""

    saved = 0

    def before(self, what, path):
        self.saved += what == "rename" and Path(path).name.endswith("step-00000004")
        if self.saved == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def scores_of(report):
    return {value.value: value.by_seed for value in report.values}


def test_killed_in_the_middle_it_goes_on_and_gives_the_same_numbers(place, compared):
    """The run that is scored is not trained again, and the one that was killed goes on from its checkpoint."""

    def work():
        storage.disk = KillingAtSave()
        compare("rows=25%,50%", "run.name=cut")

    assert run_forked(work) == -signal.SIGKILL
    assert set(read_record(Path("runs/cut")).scored) == {"1-25"}
    flag = StopAtStep(NEVER)
    resumed = compare("rows=25%,50%", "run.name=cut", auto=True, flag=flag)
    said = [event.text for event in flag.events if isinstance(event, Notice)]
    assert any(text.startswith("1 more run of 6 steps: about") for text in said)
    assert [event.step for event in flag.events if isinstance(event, StepDone)] == [3, 4, 5, 6]
    whole = scores_of(compared[1])
    assert scores_of(resumed) == {value: whole[value] for value in ("25%", "50%")}
    assert table_of(compare("rows=25%,50%", "run.name=cut", auto=True)) == table_of(resumed)


def test_another_comparison_in_the_same_folder_is_refused(place):
    with pytest.raises(OutputError):
        compare(ROWS)
    for asked, change in ((ROWS, "training.learning_rate=1e-3"), ("rows=25%,100%", "training.max_steps=6")):
        with pytest.raises(MismatchError, match="was begun with something else"):
            compare(asked, change, auto=True)


def test_seeds_have_one_held_out_set_and_rows_of_their_own_also_after_a_stop(place, compared):
    with pytest.raises(StoppedError):
        compare("rows=50%,100%", "run.name=seeds", seeds=2, flag=StopAtStep(3))
    report = compare("rows=50%,100%", "run.name=seeds", seeds=2, auto=True)
    assert report.seeds == 2
    first, second = (prepared_of(place / run) for run in report.values[0].runs)
    assert first.heldout.origins() == second.heldout.origins()
    assert first.train.origins() != second.train.origins()
    whole = scores_of(compared[1])
    for value, (of_first, of_second) in scores_of(report).items():
        assert whole[value] == (of_first,) != (of_second,)


def test_models_are_compared_by_bits_per_byte_of_the_same_text_and_one_that_diverges_is_a_line(place):
    for name in ("other", "broken"):
        build_tiny_model(place / name, seed=5)
    weights = load_file(place / "broken" / "model.safetensors")
    save_file({key: weight * 1e30 for key, weight in weights.items()}, place / "broken" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    report = compare("model=model,other,broken", "run.name=models", "training.learning_rate=none")
    scored = read_record(place / "runs" / "models").scored.values()
    assert report.measure == "bits_per_byte"
    for value, run in zip(report.values[:2], scored, strict=True):
        assert value.score == pytest.approx(sum(run.nll) / np.log(2) / sum(run.num_bytes))
    assert all(run.num_bytes[0] == len(f"It is {2 * (int(run.ids[0].split(':')[1]) - 1)}.") for run in scored)
    assert report.values[2].score is None
    assert "finite" in report.values[2].diverged
    assert [row[1].text for row in comparison_table(report).rows][2] == "diverged"


@pytest.mark.slow
def test_a_planted_source_of_noise_is_named(place):
    letters = np.random.default_rng(0).integers(97, 123, size=(60, 16)).astype(np.uint8)
    lines = [
        json.dumps({"question": f"What is {row} plus {row}, dear?", "answer": bytes(text).decode()}) for row, text in enumerate(letters)
    ]  # fmt: skip
    Path("noise.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more = [
        json.dumps({"question": f"What follows {row}?", "answer": f"It is {row + 1}."}) for row in range(60)
    ]
    Path("more.jsonl").write_text("\n".join(more) + "\n", encoding="utf-8")
    sources = 'data.sources=["rows.jsonl", "more.jsonl", "noise.jsonl"]'
    report = compare("source=each-left-out", sources, "run.name=noise", "training.max_steps=60")
    assert report.noise == ("noise.jsonl",)
    assert finding(report).startswith("noise: noise.jsonl;")


@pytest.mark.slow
def test_short_runs_order_models_as_full_runs_do_or_say_that_they_cannot_tell(place):
    """A model that has seen such rows, one that has seen others, and one that has seen none."""
    write_sums(place / "known.jsonl")
    other = [json.dumps({"question": f"Name {row}.", "answer": f"{row} is my name."}) for row in range(60)]
    (place / "strange.jsonl").write_text("\n".join(other) + "\n", encoding="utf-8")
    for name in ("known", "strange"):
        made = settings_of(place, Path("model"), f'data.sources=["{name}.jsonl"]', f"run.name={name}", "training.epochs=none",
                           "training.max_steps=20")  # fmt: skip
        train(made, StopAtStep(NEVER))
    models = "model=model,runs/strange/final,runs/known/final"
    half = "data.heldout_fraction=0.5"  # of 60 rows
    short = compare(models, half, "run.name=short", "training.max_steps=10")
    full = compare(models, half, "run.name=full", "training.max_steps=80")
    best = min(full.values, key=lambda value: value.score).value
    if short.pick is None:
        assert finding(short).startswith("too close to tell")
    else:
        assert short.pick == best
        order = [value.value for value in sorted(short.values, key=lambda value: value.score)]
        clear = [value.difference is None or value.difference.low > 0 for value in short.values]
        if all(clear):
            assert order == [value.value for value in sorted(full.values, key=lambda value: value.score)]
