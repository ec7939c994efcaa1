"""``sft presets``, ``sft schema``, ``sft env`` and ``sft doctor``: what there is, without doing anything."""

import json
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output
from sftcli.cli.results import results
from sftcli.cli.session.session import session


@command
def presets(
    *,
    name: Annotated[
        str | None, typer.Argument(help="Show the settings of this preset.", autocompletion=complete.presets)
    ] = None,
    output: Annotated[Output, "json", "color"],
) -> None:
    """List the presets, or show the settings of one.

    Examples:
      sft presets

      sft presets gpu
    """
    from sftcli.config.presets import preset_names, read_preset
    from sftcli.config.resolve import resolve

    if name is not None:
        rows = resolve(preset=name, config_file=None, overrides=(), environ={}).rows()
        results.show_settings(rows, output)
        return
    results.show_pairs({preset: read_preset(preset).description for preset in preset_names()}, output)


@command
def schema() -> None:
    """Print the JSON schema of the settings, by which editors check and complete a file for `--config`.

    Examples:
      sft schema > sft.schema.json
    """
    from sftcli.config.schema.settings import Settings

    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    typer.echo(json.dumps(head | Settings.model_json_schema(), indent=2))


@command
def env(*, output: Annotated[Output, "json", "color"]) -> None:
    """Show versions, device and folders: what a bug report needs.

    Examples:
      sft env

      sft env --json
    """
    with session(output):
        from sftcli.services.machine.facts import describe_machine

        facts = describe_machine()
    results.show_pairs(facts, output)


@command
def doctor(*, output: Annotated[Output, "json", "color"]) -> None:
    """Try what a training needs on this machine, a small training included; exit 1 if anything fails.

    Examples:
      sft doctor

      sft doctor --json
    """
    with session(output) as current:
        with current.loading():
            from sftcli.services.doctor import State, examine

        found = examine(current)
    results.show_findings(found, output)
    if any(finding.state is State.FAILS for finding in found):
        raise typer.Exit(1)
