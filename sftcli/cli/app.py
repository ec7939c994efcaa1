"""The ``sft`` program: its commands, and the way from an error to an exit code."""

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.commands import (
    diff,
    evaluate,
    export,
    generate,
    inspect,
    prepare,
    push,
    report,
    runs,
    train,
    trial,
)
from sftcli.cli.errors.show import guarded
from sftcli.cli.options import complete
from sftcli.cli.options.words import meant
from sftcli.cli.session.processes import rank_zero_output
from sftcli.cli.terminal.help_screen import SftCommand, SftGroup
from sftcli.cli.terminal.text import as_utf8
from sftcli.environment import set_defaults
from sftcli.errors import UsageError
from sftcli.version import __version__

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
    cls=SftGroup,
    help="Fine-tune causal language models on instruction-response pairs.",
    epilog='sft train\nsft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos."\nsft eval',
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare", cls=SftCommand)(prepare.prepare)
app.command("try", cls=SftCommand)(trial.trial)
app.command("train", cls=SftCommand)(train.train)
app.command("resume", cls=SftCommand)(train.resume)
app.command("generate", cls=SftCommand)(generate.generate)
app.command("eval", cls=SftCommand)(evaluate.evaluate)
app.command("export", cls=SftCommand)(export.export)
app.command("push", cls=SftCommand)(push.push)
app.command("report", cls=SftCommand)(report.report)
app.command("runs", cls=SftCommand)(runs.runs)
app.command("show", cls=SftCommand)(runs.show)
app.command("diff", cls=SftCommand)(diff.diff)
app.command("presets", cls=SftCommand)(inspect.presets)
app.command("schema", cls=SftCommand)(inspect.schema)
app.command("env", cls=SftCommand)(inspect.env)
app.command("doctor", cls=SftCommand)(inspect.doctor)


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
    arguments = sys.argv[1:] = meant(sys.argv[1:])
    command = _command_name(arguments)
    # In its own standalone mode Typer would print boxes for errors and turn a broken pipe into exit code 1.
    run = partial(_run, arguments)
    run_here = rank_zero_output(run) if command in SHARED else run
    sys.exit(guarded(run_here, command=command, json="--json" in arguments))


def _run(arguments: list[str]) -> object:
    _check_words(arguments)
    if arguments and arguments[0] in {"--show-completion", "--install-completion"}:
        complete.set_up_for_shell(arguments)
        return None
    return app(arguments, prog_name="sft", standalone_mode=False)


def _check_words(arguments: list[str]) -> None:
    """See that all names that reach a command can be written down, as settings, in a log and in JSON.

    Raises:
        UsageError: One is not UTF-8.
    """
    named = {f"{word!r} is": word for word in arguments}
    named |= {
        f"the value of {name} is": value for name, value in os.environ.items() if name.startswith("SFT_")
    }
    with suppress(OSError):
        named["the name of the current folder is"] = str(Path.cwd())
    for what, text in named.items():
        try:
            as_utf8(text)
        except UnicodeError:
            raise UsageError(
                f"{what} not UTF-8",
                hint="type it in UTF-8; files and folders can be renamed (convmv renames many at once)",
            ) from None


def _command_name(arguments: list[str]) -> str:
    return f"sft {arguments[0]}" if arguments and not arguments[0].startswith("-") else "sft"
