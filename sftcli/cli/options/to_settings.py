"""From flags to resolved settings, the same way for every command."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.errors import UsageError

if TYPE_CHECKING:
    from sftcli.config.resolve import Resolved

DEFAULT_PRESET = "quick"


def choose_preset(preset: str | None, config: str | None, data: Sequence[str] | None) -> str | None:
    """Return the preset to start from: ``quick`` when the user named neither a preset, nor a file, nor data."""
    return DEFAULT_PRESET if preset is None and config is None and not data else preset


def data_flags(
    *,
    renames: list[str] | None,
    ignored: list[str] | None,
    template: str | None,
    train_on: str | None,
    max_tokens: int | None,
    overlong: str | None,
    allow_leak: bool,
    strict: bool,
) -> Mapping[str, tuple[str, object]]:
    """Return the flags that say how rows are read, as ``resolve_flags`` takes them."""
    return {
        "data.renames": ("--map", renames or None),
        "data.ignored_keys": ("--ignore", ignored or None),
        "data.template": ("--template", template),
        "data.train_on": ("--train-on", train_on),
        "data.max_tokens": ("--max-tokens", max_tokens),
        "data.overlong": ("--overlong", overlong),
        "data.allow_leak": ("--allow-leak", allow_leak or None),
        "data.strict": ("--strict", strict or None),
    }


def resolve_flags(
    *,
    preset: str | None,
    config: str | None,
    sets: Sequence[str] | None,
    flags: Mapping[str, tuple[str, object]],
    data: Sequence[str] | None = None,
    heldout: Sequence[str] | None = None,
) -> "Resolved":
    """Resolve the settings of a command.

    Args:
        preset: Name of a preset.
        config: Path of a settings file.
        sets: Arguments of ``--set``.
        flags: Settings key -> (flag, value); a value of None was not given.
        data: Sources to train on.
        heldout: Sources to hold out.
    """
    from sftcli.config.layers import Override
    from sftcli.config.resolve import parse_set, resolve

    overrides: list[Override] = []
    if data:
        overrides.append(Override(key="data.sources", value=list(data), origin="--data"))
    if heldout:
        overrides.append(Override(key="data.heldout_sources", value=list(heldout), origin="--heldout"))
    overrides += [
        Override(key=key, value=value, origin=flag)
        for key, (flag, value) in flags.items()
        if value is not None
    ]
    faults: list[UsageError] = []
    for text in sets or ():
        try:
            overrides.append(parse_set(text))
        except UsageError as error:
            faults.append(error)
    return resolve(
        preset=preset,
        config_file=None if config is None else Path(config),
        overrides=overrides,
        environ=os.environ,
        faults=faults,
    )
