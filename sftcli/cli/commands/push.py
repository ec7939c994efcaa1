"""``sft push``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output, RunsRoot
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.figures import size

if TYPE_CHECKING:
    from sftcli.services.export.push import PushOutcome


@command
def push(
    *,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Repository on the hub: OWNER/NAME, or NAME for your own.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, or a folder that `sft export` wrote; by default the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a repository that everybody can read.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files and their sizes; the hub is not contacted.")
    ] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="Message of the commit.")] = "",
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "log_format", "color"],
) -> None:
    """Upload a final model, an adapter or an exported folder to the Hugging Face hub, with a card; private by default.

    Examples:
      sft push my-model --dry-run

      sft push me/my-model my-run

      sft push me/my-model exported --public
    """
    with session(output) as current:
        from sftcli.services.export.push import PushRequest, run_push

        request = PushRequest(
            name=name, model=model, root=runs, private=not public, dry_run=dry_run, message=message
        )
        outcome = run_push(request, current)
    if output.json:
        tables.show_result_json(asdict(outcome))
        return
    if not output.quiet:
        _show_files(outcome, output)
    tables.show_text(outcome.url or outcome.path, tables.out(output.color))


def _show_files(outcome: "PushOutcome", output: Output) -> None:
    err = tables.err(output.color)
    for name, count in outcome.files.items():
        tables.show_text(f"{size(count):>10}  {name}", err)
    kind = "private" if outcome.private else "public"
    done = "uploaded to" if outcome.url else "would go to"
    total = size(sum(outcome.files.values()))
    tables.show_text(f"{len(outcome.files)} files, {total}, {done} {outcome.repo} ({kind})", err)
