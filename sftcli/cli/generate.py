"""``sft generate``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli import options, results, tables
from sftcli.cli.lines import stdout_text_writer
from sftcli.cli.request import resolve_flags
from sftcli.cli.session import session
from sftcli.events import fan_out


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    checkpoint: options.Checkpoint = None,
    tokenizer: options.Tokenizer = None,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="System message to put before the prompt.")
    ] = "",
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Answer a prompt with the newest run's final model, or with any other.

    Examples:
      sft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos."

      sft generate "Tell me a story." --checkpoint smollm2-135m --temperature 0.7
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = resolve_flags(
        preset=None,
        config=None,
        sets=None,
        flags={
            "sampling.max_new_tokens": ("--max-new-tokens", max_new_tokens),
            "sampling.temperature": ("--temperature", temperature),
            "sampling.top_p": ("--top-p", top_p),
            "sampling.top_k": ("--top-k", top_k),
            "sampling.seed": ("--seed", seed),
        },
    ).settings
    with session(output) as (view, stop):
        from sftcli.services.generate import GenerateRequest, run_generation

        emit = view if output.json else fan_out(view, stdout_text_writer())
        completion = run_generation(
            GenerateRequest(
                prompt=text,
                sampling=sampling.sampling,
                root=runs,
                precision=sampling.training.precision,
                checkpoint=checkpoint,
                tokenizer=tokenizer,
                system=system,
            ),
            emit,
            stop,
        )
    if output.json:
        tables.show_result_json(asdict(completion))
    else:
        results.show_completion(completion, output)
    if stop.requested():
        raise typer.Exit(stop.exit_code)
