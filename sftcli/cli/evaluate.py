"""``sft eval``."""

from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli import options, results, tables
from sftcli.cli.session import session


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Run, checkpoint, folder or model name; the newest finished run.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    data: options.Data = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Model to compare with; the one the run started from."),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Compare with no other model.")] = False,
    max_rows: Annotated[
        int, typer.Option("--max-rows", metavar="N", min=1, help="Most rows to answer by generation.")
    ] = 200,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Score a model on its held-out rows beside the model it started from: loss and exact answers.

    Examples:
      sft eval

      sft eval my-run --data test.jsonl --no-base
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    with session(output) as (emit, stop):
        from sftcli.services.evaluate import EvalRequest, run_evaluation

        request = EvalRequest(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            data=tuple(data or ()),
            base=base,
            with_base=not no_base,
            max_rows=max_rows,
            root=runs,
        )
        report = run_evaluation(request, emit, stop)
    if output.json:
        tables.show_result_json(report.to_json())
    else:
        results.show_scores(report, output)
