"""From flags to resolved settings, the same way for every command."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import FLAGS, SETTINGS_PANEL, Flags
from sftcli.paths import as_path

if TYPE_CHECKING:
    from sftcli.config.layers import Override
    from sftcli.config.resolve import Resolved

DEFAULT_PRESET = "quick"

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=complete.settings,
        help="Change one setting, as in `--set training.learning_rate=1e-4`. Repeatable.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The flags that bring settings of any key."""

    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            metavar="NAME",
            autocompletion=complete.presets,
            help="Start from the settings of this preset; `sft presets` lists them.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = None
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            autocompletion=complete.config_files,
            help="Read settings from this file: TOML, YAML or JSON, or the YAML of another trainer.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = None
    sets: Set = None

    def words(self) -> list[str]:
        """Return the words of a command line that give the same."""
        given = [
            ("--preset", self.preset),
            ("--config", self.config),
            *(("--set", one) for one in self.sets or ()),
        ]
        return [word for name, value in given if value is not None for word in (name, value)]


def or_default_preset(layers: Layers, flags: Flags) -> Layers:
    """Return ``layers`` from ``quick`` on when the user named neither a preset, nor a file, nor data."""
    names_any = layers.preset is not None or layers.config is not None or flags.values[FLAGS["--data"]]
    return layers if names_any else replace(layers, preset=DEFAULT_PRESET)


def resolve_for_training(flags: Flags, layers: Layers, more: Sequence["Override"] = ()) -> "Resolved":
    """Resolve the settings of a training; what follows from a run or adapter that it goes on from is among them.

    ``more`` wins over flags and ``--set``.
    """
    from sftcli.services.train.start.going_on import resolved_with_start

    return resolved_with_start(lambda last: resolve_flags(flags, layers, last=(*more, *last)))


def require_known_variables() -> None:
    """Refuse variables of the environment that look like settings and are none, where no settings are read of it.

    Raises:
        UsageError: There is one.
    """
    from sftcli.config.layers import environment_layer
    from sftcli.config.resolve import usage_error
    from sftcli.config.schema.settings import FIELDS

    if problems := environment_layer(os.environ, FIELDS)[1]:
        raise usage_error(problems)


def resolve_flags(
    flags: Flags, layers: Layers | None = None, *, last: Sequence["Override"] = ()
) -> "Resolved":
    """Resolve the settings of a command; ``last`` is what follows from them."""
    from sftcli.config.resolve import resolve

    layers = layers or Layers()
    return resolve(
        preset=layers.preset,
        config_file=None if layers.config is None else as_path(layers.config),
        overrides=flags.overrides(),
        environ=os.environ,
        sets=layers.sets or (),
        last=last,
    )
