"""The calls for Python: what the commands do, with the manners of a library."""

import builtins
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sftcli
from sftcli import generate, prepare, train
from sftcli.api import _resolved
from sftcli.cli import app
from sftcli.config.schema.settings import Settings
from sftcli.errors import DataError, NotFoundError, ThresholdError, UsageError
from sftcli.events import Ending, HeldoutDone, StepDone, TextDelta
from tests.support.runs import write_rows
from tests.support.tiny_model import build_tiny_model

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def keys(model, tmp_path, monkeypatch) -> dict[str, object]:
    """Four steps on twenty rows, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {
        "model__name": model,
        "data__sources": write_rows(tmp_path / "rows.jsonl"),
        "data__heldout_fraction": 0.2,
        "training__max_steps": 4,
        "training__batch_size": 4,
        "training__learning_rate": 1e-2,
        "run__name": "one",
    }


def test_it_trains_the_model_that_the_command_trains(keys, monkeypatch, tmp_path):
    trained = train(**keys)
    assert trained.run == Path("runs/one")
    assert trained.final == Path("runs/one/final")
    others = keys.keys() - {"run__name", "data__sources"}
    flags = [f"--set={key.replace('__', '.')}={keys[key]}" for key in others]
    monkeypatch.setattr(
        "sys.argv", ["sft", "train", "--data", str(keys["data__sources"]), *flags, "--run", "two", "--quiet"]
    )
    with pytest.raises(SystemExit):
        app.main()
    ours, theirs = (load_file(Path("runs", run, "final", "model.safetensors")) for run in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert (
        Path("runs/one/config.toml").read_text().replace('"one"', '"two"')
        == Path("runs/two/config.toml").read_text()
    )


def test_losses_and_audit_are_those_of_the_run(keys):
    seen = []
    trained = train(**keys, on_event=seen.append)
    assert trained.losses == {event.step: event.loss for event in seen if isinstance(event, StepDone)}
    assert [*trained.losses] == [1, 2, 3, 4]
    assert trained.heldout_losses == {
        event.step: event.loss for event in seen if isinstance(event, HeldoutDone)
    }
    assert trained.outcome.last_heldout_loss == trained.heldout_losses[4]
    assert trained.audit["train"].kept + trained.audit["heldout"].kept == 25
    assert prepare(**keys).audit == trained.audit


def test_a_training_that_is_stopped_goes_on_to_the_same_losses(keys):
    whole = train(**keys)
    done = []
    stopped = train(**keys | {"run__name": "two"}, on_event=done.append, stop=lambda: _steps(done) >= 2)
    assert stopped.final is None
    assert stopped.outcome.ending is Ending.STOPPED
    assert [*stopped.losses] == [1, 2]
    assert train(**keys | {"run__name": "two"}, resume=True).losses == whole.losses


def _steps(events) -> int:
    return sum(isinstance(event, StepDone) for event in events)


def test_answers_come_in_the_order_of_the_prompts(keys, model):
    prompts = ["What is 1 plus 1?", "What is 11 plus 11, and then some more?", "Hi"]
    together = generate(prompts, model=model, sampling__max_new_tokens=5)
    pieces = []
    alone = [
        generate(prompt, model=model, sampling__max_new_tokens=5, on_event=pieces.append)[0]
        for prompt in prompts
    ]
    assert [one.text for one in together] == [one.text for one in alone]
    assert "".join(event.text for event in pieces if isinstance(event, TextDelta)) == "".join(
        one.text for one in alone
    )
    turns = [{"role": "system", "content": "Sums."}, {"role": "user", "content": prompts[0]}]
    assert generate([turns], model=model, sampling__max_new_tokens=5) != together[:1]
    assert [
        one.text for one in generate([turns[1:]], model=model, system="Sums.", sampling__max_new_tokens=5)
    ] == [one.text for one in generate([turns], model=model, sampling__max_new_tokens=5)]
    assert generate([], model=model) == []


def test_nothing_is_printed_and_warnings_stay_the_callers(keys, model, capfd):
    shown = warnings.showwarning
    trained = train(**keys)
    prepare(**keys)
    generate("Hi", model=trained.final, sampling__max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    assert warnings.showwarning is shown


def test_progress_is_lines_on_stderr_where_nobody_watches(keys, capfd):
    train(**keys, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 4/4" in err


def test_a_notebook_has_one_moving_line_and_no_stderr(keys, monkeypatch, capsys):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    train(**keys, progress=True)
    out, err = capsys.readouterr()
    assert err == ""
    moving = [part.split("]")[1][:9] for part in out.split("\r") if "] step " in part]
    assert moving == [" step 1/4", " step 2/4", " step 3/4", " step 4/4"]
    assert "\r[####################] step 4/4" in out
    assert "\nsaved runs/one/final\n" in out
    assert "\ntraining finished at step 4" in out


def test_faults_are_errors_of_the_package(keys, tmp_path):
    with pytest.raises(NotFoundError, match=r"nosuch\.jsonl"):
        train(**keys | {"data__sources": "nosuch.jsonl"})
    with pytest.raises(UsageError, match=r"training\.max_step'.*max_steps"):
        train(**keys, training__max_step=3)
    with pytest.raises(UsageError, match="unknown key 'max_steps'"):
        train(**keys, max_steps=3)
    with pytest.raises(UsageError, match=r"training\.processes is 2") as raised:
        train(**keys, training__processes=2)
    assert "torchrun --nproc-per-node 2" in raised.value.hint
    assert "sft train --processes 2" in raised.value.hint
    assert not (tmp_path / "runs").exists()
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "alone"}\n')
    with pytest.raises(ThresholdError):
        prepare(**keys, data__strict=True)
    with pytest.raises(DataError, match="nothing to answer"):
        generate(["", "b"], model=keys["model__name"])


def test_foreign_code_is_named_by_the_caller_alone():
    with pytest.raises(UsageError) as raised:
        train({"model": {"trust_remote_code": True}})
    assert "model__trust_remote_code=True" in raised.value.hint
    named = {"model__trust_remote_code": True, "model__revision": "a" * 40}
    assert _resolved(None, None, named).settings.model.trust_remote_code


def test_all_ways_of_giving_settings_mean_the_same(tmp_path, monkeypatch):
    wanted = {"training": {"max_steps": 7}, "data": {"sources": ["a.jsonl"]}, "adapter": {"kind": "lora"}}
    path = tmp_path / "some.toml"
    path.write_text(
        '[training]\nmax_steps = 7\n[data]\nsources = ["a.jsonl"]\n[adapter]\nkind = "lora"\n',
        encoding="utf-8",
    )
    named = {"training__max_steps": 7, "data__sources": Path("a.jsonl"), "adapter__kind": "lora"}
    ways = [
        _resolved(settings, None, keys).settings
        for settings, keys in [(wanted, {}), (path, {}), (str(path), {}), (None, named)]
    ]
    assert ways == [ways[0]] * 4
    assert ways[0].training.learning_rate == 2e-4  # that of an adapter
    monkeypatch.setenv("SFT_TRAINING__SEED", "5")
    assert _resolved(ways[0], None, {}).settings == ways[0]
    assert _resolved(Settings(**wanted), None, {}).settings == ways[0]
    assert _resolved(wanted, None, {}).settings.training.seed == 5
    assert _resolved(wanted, "quick", {"training__max_steps": 9}).settings.training.max_steps == 9


def test_signals_of_another_thread_are_left_alone(keys):
    before, seen, found = signal.getsignal(signal.SIGTERM), set(), []
    thread = threading.Thread(
        target=lambda: found.append(
            train(**keys, on_event=lambda _: seen.add(signal.getsignal(signal.SIGTERM)))
        )
    )
    thread.start()
    thread.join()
    assert seen == {before}
    assert found[0].final == Path("runs/one/final")


def test_a_signal_stops_a_call_of_the_main_thread_and_the_handler_is_back_after_it(keys):
    before = signal.getsignal(signal.SIGTERM)

    def at_step_two(event):
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(**keys, on_event=at_step_two).final is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_receiver_raises_ends_the_call(keys):
    def fail(event):
        if isinstance(event, StepDone):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(**keys, on_event=fail)
    assert train(**keys, resume=True).final is not None  # nothing is locked


def test_only_the_calls_are_offered():
    assert {"prepare", "train", "generate"} <= set(sftcli.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        _ = sftcli.nosuch


def test_the_page_runs_as_it_stands(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_MODEL__NAME", str(model))
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "settings.toml").write_text(
        '[data]\nsources = ["rows.jsonl"]\n[training]\nmax_steps = 1\n', encoding="utf-8"
    )
    page = (REPO / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = page.split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        exec(block.partition("```")[0], {})
    out = capsys.readouterr().out
    assert "runs/from-python runs/from-python/final" in out
    assert "HeldoutDone(" in out
    assert "not-found 66 " in out
