"""``sft eval --tasks``: tasks of ``lm_eval`` through the model that is loaded here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
metadata:
  version: 1.0
"""
CHOICES = """\
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWERS = """\
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Two tasks over ten questions, one by choice and one by answer, with nothing outside of the folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"What is {n} plus {n}?", "choices": [f"{2 * n}", f"{n}", "a ferry"], "answer": 0}
        for n in range(1, 11)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, output, target, more in (
        ("sums", "multiple_choice", "{{answer}}", CHOICES),
        ("said", "generate_until", "{{choices[0]}}", ANSWERS),
    ):
        text = TASK.format(name=name, data=data, output=output, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
def test_tasks_equal_lm_evals_own_command_on_the_exported_folder(
    task_folder, tiny_model, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm-eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    result = invoke("eval", tiny_model, "--tasks", "sums,said", "--task-path", task_folder, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    ours = json.loads(result.stdout)["tasks"]
    assert invoke("export", tiny_model, "--to", "hf", "--out", tmp_path / "given").exit_code == 0
    subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
            f"pretrained={tmp_path / 'given'},dtype=float32", "--tasks", "sums,said", "--include_path", task_folder,
            "--apply_chat_template", "--device", "cpu", "--batch_size", "8", "--output_path", tmp_path / "theirs.json",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    (written,) = [*tmp_path.glob("theirs*.json"), *tmp_path.glob("theirs*/**/*.json")]
    theirs = json.loads(written.read_text(encoding="utf-8"))["results"]
    assert set(ours) == {"sums", "said"}
    for task, numbers in ours.items():
        for metric, value in numbers.items():
            assert value == pytest.approx(theirs[task][f"{metric},none"], abs=1e-9), (task, metric)
    assert "acc_norm" in ours["sums"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_misspelled_task_gets_the_nearest(task_folder, tiny_model):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm-eval")
    error = invoke("eval", tiny_model, "--tasks", "sumz", "--task-path", task_folder).exception
    assert error.exit_code == 66
    assert "'sums'" in error.hint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_number_of_a_task_can_be_a_limit(task_folder, tiny_model):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm-eval")
    ask = ("eval", tiny_model, "--tasks", "sums", "--task-path", task_folder, "--task-rows", 4)
    assert invoke(*ask, "--fail-above", "sums/acc=-1").exception.exit_code == 3


@pytest.mark.parametrize("flags", [["--shots", 2], ["--tasks", "sums", "--data", "x.jsonl"]])
def test_flags_that_do_not_go_together_are_refused(flags, tiny_model):
    assert invoke("eval", tiny_model, *flags).exception.exit_code == 2
