"""``sft diff``."""

from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output, RunsRoot
from sftcli.cli.results.difference import show_difference
from sftcli.cli.session.session import session


@command
def diff(
    *,
    before: Annotated[
        str, typer.Argument(metavar="A", help="Run by name or path.", autocompletion=complete.runs)
    ],
    after: Annotated[
        str, typer.Argument(metavar="B", help="Run to compare with it.", autocompletion=complete.runs)
    ],
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "color"],
) -> None:
    """Show what differs between two runs: rows, settings, versions, losses, and answers that became right or wrong.

    Examples:
      sft diff first second

      sft diff first second --json
    """
    with session(output):
        from sftcli.services.diff.compare import compare_runs
        from sftcli.services.runs.folder import find_run

        found = compare_runs(find_run(before, runs), find_run(after, runs))
    show_difference(found, output)
