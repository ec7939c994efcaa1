"""``sft train`` and ``sft resume``."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli import options, results, tables
from sftcli.cli.request import choose_preset, data_flags, resolve_flags
from sftcli.cli.session import session
from sftcli.events import Notice

if TYPE_CHECKING:
    from sftcli.services.train import TrainOutcome


def train(
    preset: options.Preset = None,
    config: options.Config = None,
    sets: options.Set = None,
    max_steps: options.MaxSteps = None,
    seed: options.Seed = None,
    data: options.Data = None,
    heldout: options.Heldout = None,
    model: options.Model = None,
    renames: options.Map = None,
    template: options.Template = None,
    train_on: options.TrainOn = None,
    max_tokens: options.MaxTokens = None,
    run: options.RunName = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Show every setting, its value and where it was set, and do nothing else.",
            rich_help_panel=options.SETTINGS_PANEL,
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Fine-tune a model. Without arguments it runs the preset `quick`.

    Examples:
      sft train --data rows.jsonl --max-steps 200

      sft train --preset gpu --set training.learning_rate=2e-5
    """
    output = options.Output(json=json, quiet=quiet, verbose=verbose, color=color)
    chosen = choose_preset(preset, config, data)
    resolved = resolve_flags(
        preset=chosen,
        config=config,
        sets=sets,
        data=data,
        heldout=heldout,
        flags={
            "training.max_steps": ("--max-steps", max_steps),
            "training.seed": ("--seed", seed),
            "model.name": ("--model", model),
            **data_flags(renames=renames, template=template, train_on=train_on, max_tokens=max_tokens),
            "run.name": ("--run", run),
        },
    )
    if print_config:
        results.show_settings(resolved.rows(), output)
        return
    with session(output, every_steps=resolved.settings.training.log_every_steps) as (emit, stop):
        emit(Notice(text="loading torch and transformers"))
        from sftcli.services.train import TrainRequest, run_training

        label = chosen or Path(config or "run").stem
        request = TrainRequest(resolved=resolved, label=label, command=shlex.join(["sft", *sys.argv[1:]]))
        outcome = run_training(request, emit, stop)
    _show(outcome, output, stop.exit_code)


def resume(
    run: Annotated[
        str | None, typer.Argument(help="Run to go on with, by name or path; the newest unfinished one.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--checkpoint", metavar="STEP", help="Go on from the checkpoint of this step."),
    ] = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Go on with a stopped run as if it had never stopped.

    Examples:
      sft resume

      sft resume my-run --checkpoint 200
    """
    output = options.Output(json=json, quiet=quiet, verbose=verbose, color=color)
    with session(output, every_steps=10) as (emit, stop):
        from sftcli.services.train import ResumeRequest, resume_training

        outcome = resume_training(ResumeRequest(root=runs, run=run, step=step), emit, stop)
    _show(outcome, output, stop.exit_code)


def _show(outcome: "TrainOutcome", output: options.Output, stop_code: int) -> None:
    """Print how a run ended: the final model's path on stdout, the rest on stderr."""
    if output.json:
        tables.show_result_json(asdict(outcome))
    else:
        results.show_training(outcome, output)
    if outcome.final is None:
        raise typer.Exit(stop_code)
