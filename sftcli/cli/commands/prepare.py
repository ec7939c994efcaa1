"""``sft prepare``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import ROW_FLAGS, Flags
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output
from sftcli.cli.options.to_settings import Layers, or_default_preset, resolve_for_training
from sftcli.cli.results import audit as audit_view
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.errors import UsageError


class OutFormat(StrEnum):
    """As what rows are written."""

    PARQUET = "parquet"
    MESSAGES = "messages"


@command
def prepare(
    *,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="Files, folders or hub names, each SOURCE[:ROWS].",
            autocompletion=complete.rows,
        ),
    ] = None,
    layers: Layers,
    flags: Annotated[Flags, "--heldout", "--model", "--tokenizer", *ROW_FLAGS],
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Show the first N rows as the model sees them.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write the rows to this folder, also for other trainers; a name in .jsonl is one file of messages.",
        ),
    ] = None,
    out_format: Annotated[
        OutFormat | None,
        typer.Option(
            "--out-format",
            help="Write token ids and masks (parquet, the default) or the kept rows as messages in JSON lines.",
        ),
    ] = None,
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Read, check and tokenize instruction data, and show what is trained and what is not.

    Examples:
      sft prepare rows.jsonl --show 2

      sft prepare tatsu-lab/alpaca:5000 --model smollm2-135m

      sft prepare rows.jsonl --strict --out prepared

      sft prepare rows.parquet --where "quality>=4" --duplicates drop --out clean.jsonl
    """
    is_file = out is not None and out.suffix == ".jsonl"
    if out is None and out_format:
        raise UsageError("--out-format needs --out", hint="name a folder: --out DIR")
    if is_file and out_format is OutFormat.PARQUET:
        raise UsageError(f"{out} is a file of messages", hint="name a folder, or leave out --out-format")
    flags = flags.with_value("--data", sources)
    resolved = resolve_for_training(flags, or_default_preset(layers, flags))
    with session(output) as current:
        current.note(resolved.notices)
        from sftcli.services.prepare.prepare import PrepareRequest, run_prepare

        request = PrepareRequest(
            settings=resolved.settings,
            show=show,
            out=out,
            as_messages=is_file or out_format is OutFormat.MESSAGES,
        )
        outcome = run_prepare(request, current)
    if output.json:
        outcome.fitness.require()  # first, for --json prints one object, also on failure
        tables.show_result_json(outcome.to_json())
    else:
        audit_view.show_prepared(outcome, output)
