"""The ``sft`` program: its commands, and the way from an error to an exit code."""

import sys
from functools import partial
from typing import Annotated

import typer

from sftcli import __version__
from sftcli.cli import evaluate, export, generate, inspect, prepare, report, runs, train
from sftcli.cli.errors_view import guarded
from sftcli.cli.several import as_one_voice
from sftcli.environment import set_defaults

SHARED = {"sft train", "sft resume", "sft eval"}  # what several processes can do together

START = f"""sft {__version__}: fine-tune causal language models on instruction-response pairs.

First run, a few minutes on a laptop:
  sft train
  sft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos."
  sft eval

Your own rows:
  sft prepare rows.jsonl --show 2
  sft train --data rows.jsonl

All commands: sft --help"""

app = typer.Typer(
    name="sft",
    help="Fine-tune causal language models on instruction-response pairs.",
    epilog='First run: sft train. Then: sft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos." and sft eval.',
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("runs")(runs.runs)
app.command("show")(runs.show)
app.command("presets")(inspect.presets)
app.command("env")(inspect.env)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"sft {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Fine-tune causal language models on instruction-response pairs."""
    if context.invoked_subcommand is None:
        typer.echo(START)


def main() -> None:
    """Run ``sft`` with the process's arguments and end the process with its exit code."""
    set_defaults()
    arguments = sys.argv[1:]
    command = _command_name(arguments)
    # In its own standalone mode Typer would print boxes for errors and turn a broken pipe into exit code 1.
    run = partial(app, arguments, prog_name="sft", standalone_mode=False)
    run_here = as_one_voice(run) if command in SHARED else run
    sys.exit(guarded(run_here, command=command, json="--json" in arguments))


def _command_name(arguments: list[str]) -> str:
    return f"sft {arguments[0]}" if arguments and not arguments[0].startswith("-") else "sft"
