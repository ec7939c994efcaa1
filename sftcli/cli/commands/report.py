"""``sft report``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import ModelFlags, Output, Processes, RunsRoot
from sftcli.cli.results.ledger import show_ledger
from sftcli.cli.session.processes import is_first, is_one_of_several, start_several
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.errors import UsageError

if TYPE_CHECKING:
    from sftcli.services.report.ledger import Ledger

ROWS_PANEL = "Rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlags:
    """Whether rows are scored, and how."""

    rows: Annotated[
        bool,
        typer.Option(
            "--rows",
            help="First score every row with the base and the tuned model, and list those that may be wrong.",
            rich_help_panel=ROWS_PANEL,
        ),
    ] = False
    max_rows: Annotated[
        int | None,
        typer.Option(
            "--max-rows",
            metavar="N",
            min=1,
            help="Maximum number of rows to score, 10,000 unless set; of more they are drawn evenly.",
            rich_help_panel=ROWS_PANEL,
        ),
    ] = None
    model: Annotated[ModelFlags, "base_model", "trusts_code"]
    processes: Processes = 1


@command
def report(
    *,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...",
            help="Runs by name or path; the newest finished one.",
            autocompletion=complete.runs,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Output file; by default in the first run's folder."
        ),
    ] = None,
    scored: RowFlags,
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Write one HTML page about a run, or about several side by side. It needs no network, and no model but for --rows.

    Examples:
      sft report

      sft report my-run --rows

      sft report first second --out compared.html
    """
    from sftcli.services.runs.folder import find_run
    from sftcli.services.runs.outcome import newest_finished

    _check_rows(scored, names or ())
    # What is no run is refused here, and not after minutes of scoring.
    chosen = [find_run(name, runs) for name in names or ()] or [newest_finished(runs)]
    if scored.rows and scored.processes > 1 and not is_one_of_several():
        raise typer.Exit(start_several(scored.processes, output))
    ledger = _score_rows(scored, names, runs, output) if scored.rows else None
    if not is_first():
        return
    with session(output):
        from sftcli.services.report.html import write_report

        default = chosen[0].report if len(chosen) == 1 else chosen[0].path / "comparison.html"
        written = write_report(chosen, out or default)
    if output.json:
        found = {} if ledger is None else {"rows": ledger.to_json()}
        tables.show_result_json({"report": str(written), **found})
        return
    if ledger is not None:
        show_ledger(ledger, output)
    tables.show_text(str(written), tables.out(output.color))


def _check_rows(scored: RowFlags, names: Sequence[str]) -> None:
    """Refuse flags of the rows without them, and the rows of several runs.

    Raises:
        UsageError: There is such a flag, or several runs are named.
    """
    given = {
        "--max-rows": scored.max_rows is not None,
        "--processes": scored.processes > 1,
        "--base-model": scored.model.base_model is not None,
        "--trust-remote-code": scored.model.trusts_code,
    }
    if not scored.rows and (flag := next((flag for flag, is_given in given.items() if is_given), "")):
        raise UsageError(f"{flag} needs --rows", hint="without it no model is run")
    if scored.rows and len(names) > 1:
        raise UsageError("--rows takes one run", hint="score the rows of one after the other, then compare")


def _score_rows(scored: RowFlags, names: list[str] | None, runs: Path, output: Output) -> "Ledger":
    with session(output) as current:
        with current.loading():
            from sftcli.services.evaluate.ledger.run import MOST_ROWS, LedgerRequest, run_ledger

        request = LedgerRequest(
            run=names[0] if names else None,
            root=runs,
            most_rows=scored.max_rows or MOST_ROWS,
            trusts_code=scored.model.trusts_code,
            base_model=scored.model.base_model,
        )
        return run_ledger(request, current)
