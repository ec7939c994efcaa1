"""The run that a command goes on with, and the settings that it was started with. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.layers import Override
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import Settings
from sftcli.errors import NotFoundError
from sftcli.services.runs.folder import RunFolder, find_run, newest_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run, the settings that it was ``started`` with, and those, changed by what the user says now."""

    run: RunFolder
    started: Settings
    settings: Settings


def find_recorded(
    name: str | None, root: Path, overrides: Sequence[Override], *, finished: bool | None = False
) -> Recorded:
    """Return the run called ``name``, or the newest under ``root`` of those that are unfinished, or that ``finished`` says.

    Raises:
        NotFoundError: There is none.
    """
    run = newest_run(root, finished=finished) if name is None else find_run(name, root)
    if not run.config.is_file():
        raise NotFoundError(
            f"{run.path} lacks {run.config.name}, the settings that it was started with",
            hint=f"start it anew under another name; its command was: {run.read_about().get('command')}",
        )
    return Recorded(run=run, started=read_settings(run), settings=read_settings(run, overrides))


def read_settings(run: RunFolder, overrides: Sequence[Override] = ()) -> Settings:
    """Return the settings that ``run`` was started with, changed by ``overrides``."""
    return resolve(preset=None, config_file=run.config, overrides=overrides, environ={}).settings
