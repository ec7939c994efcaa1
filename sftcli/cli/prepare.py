"""``sft prepare``."""

from typing import Annotated

import typer

from sftcli.cli import complete, options, results, tables
from sftcli.cli.request import choose_preset, data_flags, resolve_flags
from sftcli.cli.session import session


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="Files, folders or hub names, each SOURCE[:ROWS].",
            autocompletion=complete.rows,
        ),
    ] = None,
    preset: options.Preset = None,
    config: options.Config = None,
    sets: options.Set = None,
    heldout: options.Heldout = None,
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    renames: options.Map = None,
    template: options.Template = None,
    train_on: options.TrainOn = None,
    max_tokens: options.MaxTokens = None,
    overlong: options.Overlong = None,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Show the first N rows as the model sees them.")
    ] = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Read, check and tokenise instruction data, and say what is trained and what is not.

    Examples:
      sft prepare rows.jsonl --show 2

      sft prepare tatsu-lab/alpaca:5000 --model smollm2-135m
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    resolved = resolve_flags(
        preset=choose_preset(preset, config, sources),
        config=config,
        sets=sets,
        data=sources,
        heldout=heldout,
        flags={
            "model.name": ("--model", model),
            "model.tokenizer": ("--tokenizer", tokenizer),
            **data_flags(
                renames=renames,
                template=template,
                train_on=train_on,
                max_tokens=max_tokens,
                overlong=overlong,
            ),
        },
    )
    with session(output) as (emit, stop):
        from sftcli.services.prepare import PrepareRequest, run_prepare

        outcome = run_prepare(PrepareRequest(settings=resolved.settings, show=show), emit, stop)
    if output.json:
        tables.show_result_json(outcome.to_json())
    else:
        results.show_prepared(outcome, output)
