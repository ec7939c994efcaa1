"""The verdict on a run: what its held-out loss allows, and advice that runs as it is printed."""

import shlex
from pathlib import Path

import pytest

from sftcli.config.resolve import parse_set, resolve, to_toml
from sftcli.services.diagnosis.verdict import Again, Measured, judge_losses
from sftcli.services.runs.folder import RunFolder

ENOUGH = 200


def again(*sets):
    settings = resolve(
        preset=None, config_file=None, overrides=[parse_set(text) for text in sets], environ={}
    ).settings
    return Again(run=RunFolder(Path("runs") / "one"), settings=settings)


def judged(train, heldout, *, rows=ENOUGH, error=None):
    measured = [
        Measured(step=10 * at, loss=loss, fall_error=error if at else None) for at, loss in enumerate(heldout)
    ]
    return judge_losses(train, measured, again(), rows=rows)


@pytest.mark.parametrize(
    ("train", "heldout", "error", "kind"),
    [
        ([2.0, 1.0, 0.5], [2.0, 1.0, 0.6], 0.05, "good"),
        ([2.0, 1.0, 0.1], [2.0, 0.9, 1.2], 0.05, "overfitting"),
        ([2.0, 1.9, 1.8], [2.1, 1.9, 1.8], 0.05, "good"),  # high, as free text is, and much lower than before
        ([1.5, 1.4, 1.3], [1.6, 1.5, 1.45], 0.1, "unchanged"),
        ([2.0], [1.0], None, "unknown"),
        ([0.5] * 20, [0.500, 0.515], 0.01, "unchanged"),
        ([2.0, 1.0], [0.001, 0.001], 0.0, "unchanged"),
        ([2.0, 1.0], [0.60, 0.59], 0.004, "good"),
        ([2.0, 1.0], [0.60, 0.59], 0.006, "unchanged"),
        ([2.0, 1.0], [0.60, 0.59], None, "good"),  # a log of an older version
        ([0.9, 0.8], [0.5, 0.9], 0.01, "degrading"),
    ],
)
def test_verdict_follows_the_curves_as_far_as_their_rows_can_tell(train, heldout, error, kind):
    assert judged(train, heldout, error=error).kind == kind


@pytest.mark.parametrize("heldout", [[2.0, 0.6], [0.9, 0.91], [0.5, 0.9], [0.9, 0.5, 0.95]])
def test_few_rows_are_too_few_to_say(heldout):
    verdict = judged([2.0, 0.5], heldout, rows=3)
    assert (verdict.kind, verdict.reason) == ("unknown", "3 held-out rows are too few to say")


def test_a_fall_is_told_with_its_standard_error():
    reason = judged([2.0, 0.5], [2.0, 1.5], error=0.05).reason
    assert reason == "held-out loss fell from 2.000 to 1.500, by 0.500 with a standard error of 0.050"


@pytest.mark.parametrize(
    "sets", [(), ("training.max_steps=40",), ("training.epochs=2", "training.learning_rate=1e-3")]
)
@pytest.mark.parametrize(
    ("heldout", "rows"), [([2.0, 2.0], 50), ([0.5, 0.9], 50), ([2.0, 0.9, 1.2], 50), ([2.0, 1.0], 3), ([], 0)]
)
def test_every_advice_is_a_command_whose_settings_resolve(tmp_path, monkeypatch, sets, heldout, rows):
    monkeypatch.chdir(tmp_path)
    maker = again("run.name=one", "data.sources=rows.jsonl", *sets)
    maker.run.path.mkdir(parents=True)
    maker.run.config.write_text(to_toml(maker.settings))
    measured = [Measured(step=10 * at, loss=loss) for at, loss in enumerate(heldout)]
    command = judge_losses([0.9, 0.8], measured, maker, rows=rows).advice.partition(": ")[2]
    words = shlex.split(command)
    assert words[:6] == ["sft", "train", "--config", "runs/one/config.toml", "--run", "one-2"]
    from typer.testing import CliRunner

    from sftcli.cli.app import app

    shown = CliRunner().invoke(app, [*words[1:], "--print-config"])
    assert shown.exit_code == 0, shown.output


def test_the_name_in_an_advice_is_free(tmp_path):
    run = RunFolder(tmp_path / "one")
    (tmp_path / "one-2").mkdir()
    assert "--run one-3 " in Again(run=run, settings=again().settings).command("--epochs 2")
