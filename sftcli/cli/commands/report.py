"""``sft report``."""

from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output, RunsRoot
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables


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
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Write one HTML page about a run, or about several side by side. It needs no network and no model.

    Examples:
      sft report

      sft report first second --out compared.html
    """
    with session(output):
        from sftcli.services.report.html import write_report
        from sftcli.services.runs.folder import find_run
        from sftcli.services.runs.outcome import newest_finished

        chosen = [find_run(name, runs) for name in names or ()] or [newest_finished(runs)]
        default = chosen[0].report if len(chosen) == 1 else chosen[0].path / "comparison.html"
        written = write_report(chosen, out or default)
    if output.json:
        tables.show_result_json({"report": str(written)})
    else:
        tables.show_text(str(written), tables.out(output.color))
