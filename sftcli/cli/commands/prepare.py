"""``sft prepare``."""

from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options import data as data_options
from sftcli.cli.options import shared as options
from sftcli.cli.options.to_settings import choose_preset, data_flags, resolve_flags
from sftcli.cli.results import audit as audit_view
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables


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
    renames: data_options.Map = None,
    ignored: data_options.Ignore = None,
    template: data_options.Template = None,
    train_on: data_options.TrainOn = None,
    max_tokens: data_options.MaxTokens = None,
    overlong: data_options.Overlong = None,
    allow_leak: data_options.AllowLeak = False,
    strict: data_options.Strict = False,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Show the first N rows as the model sees them.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Write the rows there as Parquet files, for other trainers too."
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Read, check and tokenise instruction data, and say what is trained and what is not.

    Examples:
      sft prepare rows.jsonl --show 2

      sft prepare tatsu-lab/alpaca:5000 --model smollm2-135m

      sft prepare rows.jsonl --strict --out prepared
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
                ignored=ignored,
                template=template,
                train_on=train_on,
                max_tokens=max_tokens,
                overlong=overlong,
                allow_leak=allow_leak,
                strict=strict,
            ),
        },
    )
    with session(output) as current:
        from sftcli.services.prepare.prepare import PrepareRequest, run_prepare

        request = PrepareRequest(settings=resolved.settings, show=show, out=out)
        outcome = run_prepare(request, current)
    if not output.json:
        audit_view.show_prepared(outcome, output)
    outcome.fitness.require()  # first, for --json prints one object, also on failure
    if output.json:
        tables.show_result_json(outcome.to_json())
