"""``sft eval``."""

from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli import complete, options, results, tables
from sftcli.cli.session import session


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Run, checkpoint, folder or model name; the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    data: options.Data = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            autocompletion=complete.models,
            help="Model to compare with; the one the run started from.",
        ),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Compare with no other model.")] = False,
    max_rows: Annotated[
        int, typer.Option("--max-rows", metavar="N", min=1, help="Most rows to answer by generation.")
    ] = 200,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Rows scored at once; numbers do not depend on it."
        ),
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above", metavar="METRIC=VALUE", help="Exit with 3 if the number is larger. Repeatable."
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under", metavar="METRIC=VALUE", help="Exit with 3 if the number is smaller. Repeatable."
        ),
    ] = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Score a model on its held-out rows beside the model it started from: loss, answers, repetition, copying.

    Examples:
      sft eval

      sft eval my-run --data test.jsonl --no-base

      sft eval --fail-above loss=1.0 --fail-under match_fraction=0.5
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    with session(output) as (emit, stop):
        from sftcli.services.evaluate import EvalRequest, check_limits, run_evaluation

        request = EvalRequest(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            data=tuple(data or ()),
            base=base,
            with_base=not no_base,
            max_rows=max_rows,
            root=runs,
            batch_size=batch_size,
        )
        report = run_evaluation(request, emit, stop)
    if not output.json:
        results.show_scores(report, output)
    check_limits(
        report, fail_above or (), fail_under or ()
    )  # first, for --json prints one object, also on failure
    if output.json:
        tables.show_result_json(report.to_json())
