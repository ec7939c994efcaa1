"""What a tracker of numbers is, and what all of them need."""

from collections.abc import Callable, Mapping
from typing import Protocol

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.services.runs.folder import RunFolder

PROJECT = "sft"


class Numbers(Protocol):
    """Where numbers go."""

    def log(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """Be done."""
        ...


def kept_id(run: RunFolder, kind: str, make: Callable[[], str]) -> str:
    """Return the tracker's name of this run: the same one when the run is resumed."""
    path = run.trackers / f"{kind}.id"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = make()
    storage.make_folders(run.trackers)
    storage.replace_file(path, f"{made}\n".encode())
    return made


def flat_settings(settings: Settings) -> dict[str, object]:
    """Return the settings as ``section.key`` -> value; trackers show no tables."""
    return {
        f"{section}.{key}": value
        for section, values in settings.model_dump(mode="json", exclude_none=True).items()
        for key, value in values.items()
    }
