"""A slip in a name or a number is told before torch is loaded and before anything is made."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from sftcli import errors
from sftcli.events import unheard
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.lock import EvaluationLock, OutputLock, RunLock
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER = 99
# Runs commands, one after the other, in a process that cannot import torch.
WITHOUT_TORCH = """
import contextlib, io, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "peft"}:
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, Block())
from sftcli.cli import app

found = []
for words in json.load(sys.stdin):
    sys.argv, out, err = ["sft", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as end:
            code = end.code
    found.append([code, out.getvalue() + err.getvalue()])
print(json.dumps(found))
"""
TRAIN = ("train", "--data", "rows.jsonl", "--model", "model")
FILE = ("generate", "--checkpoint", "whole", "--file")
Slip = tuple[tuple[str, ...], int, str]
SLIPS: tuple[Slip, ...] = (
    # the model
    (("train", "--data", "rows.jsonl", "--model", "modle"), 66, "did you mean 'model'?"),
    (("train", "--data", "rows.jsonl", "--model", "rows.jsonl"), 2, "is not a model"),
    (("train", "--data", "rows.jsonl", "--model", "empty"), 66, "the folder empty is empty"),
    (("train", "--data", "rows.jsonl", "--model", "models/of/nobody"), 66, "no file, folder or model"),
    (("train", "--data", "rows.jsonl", "--model", "begun"), 66, "run begun has no model yet"),
    ((*TRAIN, "--set", "model.revision=main"), 2, "applies to hub models"),
    ((*TRAIN, "--tokenizer", "model"), 2, "--tokenizer is for .pt files only"),
    ((*TRAIN, "--plan", "--model", "modle"), 66, "did you mean 'model'?"),
    (("prepare", "rows.jsonl", "--model", "modle"), 66, "did you mean 'model'?"),
    (("try", "rows.jsonl", "--model", "modle"), 66, "did you mean 'model'?"),
    # the rows
    (("try", "row.jsonl", "--model", "model"), 66, "row.jsonl"),
    (("train", "--data", "row.jsonl", "--model", "model"), 66, "row.jsonl"),
    ((*TRAIN, "--heldout", "row.jsonl"), 66, "row.jsonl"),
    # the template
    ((*TRAIN, "--template", "llama3"), 2, "no chat template 'llama3'"),
    ((*TRAIN, "--template", "broken.jinja"), 65, "not valid Jinja"),
    (("prepare", "rows.jsonl", "--model", "model", "--template", "llama3"), 2, "no chat template 'llama3'"),
    (("try", "rows.jsonl", "--model", "model", "--template", "llama3"), 2, "no chat template 'llama3'"),
    # the run
    ((*TRAIN, "--run", "whole"), 73, "runs/whole exists already"),
    ((*TRAIN, "--run", "stopped"), 73, "resume it: sft resume stopped"),
    ((*TRAIN, "--runs", "rows.jsonl"), 73, "rows.jsonl is not a folder"),
    ((*TRAIN, "--run", "strange", "--resume", "auto"), 73, "is not a run: it holds notes.txt"),
    ((*TRAIN, "--run", "busy", "--resume", "auto"), 73, "run busy is in use by pid"),
    # the machine
    ((*TRAIN, "--track", "mlflow"), 2, "mlflow"),
    ((*TRAIN, "--run", "large", "--set", "checkpoint.keep_last=1000000", "--save-every", "1"), 74, "free"),
    # comparing
    ((*TRAIN, "--compare", "rwos=10%,20%"), 2, "there is no axis 'rwos'"),
    ((*TRAIN, "--compare", "rows=50%"), 2, "has one value"),
    ((*TRAIN, "--compare", "rows=50%,200%"), 2, "at most 100%"),
    ((*TRAIN, "--compare", "model=model,modle"), 66, "did you mean 'model'?"),
    ((*TRAIN, "--compare", "lr=1e-3,2"), 2, "training.learning_rate is 2 but must be"),
    ((*TRAIN, "--compare", "source=each-left-out"), 2, "needs two sources or more"),
    ((*TRAIN, "--compare", "lr=1e-3,1e-2", "--run", "whole"), 73, "runs/whole exists already"),
    ((*TRAIN, "--compare", "lr=1e-3,1e-2", "--processes", "2"), 2, "trains in one process"),
    ((*TRAIN, "--compare", "lr=1e-3,1e-2", "--seeds", "11"), 2, "--seeds"),
    ((*TRAIN, "--seeds", "3"), 2, "--seeds goes with --compare"),
    # resuming
    (("resume", "sotpped"), 66, "did you mean 'stopped'?"),
    (("resume", "stopped", "--checkpoint", "5"), 66, "it has: 3, 4"),
    (("resume", "stopped", "--verify", "--checkpoint", "4"), 66, "no checkpoint behind step 4"),
    (("resume", "once", "--verify"), 66, "run once has one checkpoint, of step 3,"),
    (("resume", "stopped", "--allow-change", "training.lr"), 2, "unknown key"),
    (("resume", "stopped", "--allow-change", "model.name"), 2, "it cannot change"),
    (("resume", "busy"), 73, "run busy is in use by pid"),
    (("resume", "--runs", "none"), 66, "no unfinished run under none"),
    # generate
    (("generate", "hello", "--checkpoint", "nosuch"), 66, "nosuch"),
    (("generate", "hello", "--checkpoint", "stoped"), 66, "did you mean 'stopped'?"),
    (("train", "--data", "rows.jsonl", "--model", "stoped"), 66, "did you mean 'stopped'?"),
    (("generate", "hello", "--runs", "none"), 66, "no finished run under none"),
    (("generate", "hello", "--checkpoint", "begun"), 66, "run begun has no model yet"),
    (("generate", "hello", "--checkpoint", "model", "--base"), 2, "its base is unknown"),
    (("generate", "hello", "--checkpoint", "model", "--base-model", "model"), 2, "is not an adapter"),
    (("generate", "hello", "--checkpoint", "model", "--trust-remote-code"), 2, "model is not one"),
    (("generate", "hello", "--checkpoint", "whole", "--tokenizer", "empty"), 66, "empty"),
    (("generate", " ", "--checkpoint", "whole"), 2, "the prompt is empty"),
    (("generate", "--chat", "--checkpoint", "nosuch"), 66, "nosuch"),
    ((*FILE, "nosuch.jsonl", "--out", "answers.jsonl"), 66, "nosuch.jsonl"),
    ((*FILE, "rows.jsonl", "--out", "rows.jsonl"), 73, "exists already"),
    ((*FILE, "rows.jsonl", "--out", "rows.jsonl/answers.jsonl"), 73, "rows.jsonl is not a folder"),
    ((*FILE, "rows.jsonl", "--out", "busy.jsonl"), 73, "busy.jsonl is in use by pid"),
    (("export", "whole", "--to", "hf", "--out", "busy.jsonl"), 73, "busy.jsonl is in use by pid"),
    (("eval", "busy"), 73, "the evaluation of busy is in use by pid"),
    # eval
    (("eval", "nosuch"), 66, "nosuch"),
    (("eval", "model"), 2, "not from a run with held-out rows"),
    (("eval", "whole", "--base", "nosuch"), 66, "nosuch"),
    (("eval", "whole", "--data", "row.jsonl"), 66, "row.jsonl"),
    (("eval", "--runs", "none"), 66, "no finished run under none"),
    (("eval", "whole", "--fail-above", "los=1"), 2, "los"),
    (("eval", "whole", "--check", "feilds"), 2, "did you mean 'fields'?"),
    (("eval", "whole", "--check", "nowhere.py:grade"), 66, "nowhere.py"),
    (("eval", "whole", "--check", "regex:("), 2, "no regular expression"),
    (("eval", "whole", "--fail-under", "label.macro_f2=1"), 2, "did you mean 'label.macro_f1'?"),
    (("eval", "whole", "--check", "none", "--fail-under", "fields.city=1"), 2, "unknown metric 'fields.city'"),
    (("eval", "whole", "--check", "json", "--fail-under", "label=1"), 2, "unknown metric 'label'"),
    # export
    (("export", "--to", "hf", "--out", "new", "nosuch"), 66, "nosuch"),
    (("export", "--to", "hf", "--out", "model", "whole"), 73, "exists already"),
    (("export", "--to", "hf", "--out", "rows.jsonl/new", "whole"), 73, "rows.jsonl is not a folder"),
    (("export", "--to", "gguf", "--out", "rows.jsonl/a/b.gguf", "whole"), 73, "rows.jsonl is not a folder"),
    (("export", "--to", "hf", "--out", "new", "--dtype", "q8_0", "whole"), 2, "cannot be written as q8_0"),
    (("export", "--to", "hf", "--out", "new", "--runs", "none"), 66, "no finished run under none"),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and runs that are finished, stopped, and not begun."""
    folder = tmp_path_factory.mktemp("place")
    build_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 12)
    (folder / "empty").mkdir()
    (folder / "broken.jinja").write_text("{% for %}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        short = "training.epochs=1"
        train(settings_of(Path(), Path("model"), "run.name=whole", short), StopAtStep(NEVER))
        train(settings_of(Path(), Path("model"), "run.name=stopped"), StopAtStep(4))
        train(
            settings_of(Path(), Path("model"), "run.name=once", short, "checkpoint.every_steps=0"),
            StopAtStep(NEVER),
        )
    shutil.copytree(folder / "runs" / "stopped", folder / "runs" / "busy")
    begun = folder / "runs" / "begun"
    begun.mkdir()
    (begun / "run.json").write_text('{"started_at": "2000-01-01T00:00:00+00:00"}')
    (folder / "runs" / "strange").mkdir()
    (folder / "runs" / "strange" / "notes.txt").write_text("mine")
    return folder


def everything(folder: Path) -> list[str]:
    """Return what is in ``folder``, but for what the cache remembers of tokenizers that passed."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in found if path.parts[:2] != ("cache", "tried"))


@pytest.fixture(scope="module")
def outcomes(place: Path) -> dict[tuple[str, ...], tuple[int, str]]:
    """What each slip led to, where torch cannot be imported."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as held:
        for lock in (
            RunLock(place / "runs" / "busy", unheard),
            OutputLock(place / "busy.jsonl"),
            EvaluationLock(RunFolder(place / "runs" / "busy")),
        ):
            held.enter_context(lock)
        before = everything(place)
        patch.setenv("SFT_CACHE_DIR", str(place / "cache"))
        patch.setenv("PYTHONPATH", str(Path(errors.__file__).parents[1]))
        patch.setenv("COLUMNS", "500")
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH], cwd=place, input=json.dumps([slip[0] for slip in SLIPS]),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert everything(place) == before
    assert not done.returncode, done.stderr
    return {slip[0]: (code, text) for slip, (code, text) in zip(SLIPS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: " ".join(slip[0]))
def test_a_slip_is_told_without_torch_and_leaves_nothing_behind(outcomes, slip: Slip):
    words, code, message = slip
    found, text = outcomes[words]
    assert (found, message in text) == (code, True), text
    assert "loading torch" not in text
