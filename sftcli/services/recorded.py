"""The run that a command goes on with, and the settings that it was started with. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.sources import Override, Settings, resolve
from sftcli.services.run_folder import RunFolder, find_run, newest_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run and its settings, changed by what the user says now."""

    run: RunFolder
    settings: Settings


def find_recorded(
    name: str | None, root: Path, overrides: Sequence[Override], *, finished: bool | None = False
) -> Recorded:
    """Return the run called ``name``, or the newest under ``root`` of those that are unfinished, or that ``finished`` says.

    Raises:
        NotFoundError: There is none.
    """
    run = newest_run(root, finished=finished) if name is None else find_run(name, root)
    settings = resolve(preset=None, config_file=run.config, overrides=overrides, environ={}).settings
    return Recorded(run=run, settings=settings)
