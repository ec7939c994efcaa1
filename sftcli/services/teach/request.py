"""What becomes of answers, as a person asks for it. Needs no torch."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sftcli.errors import NotFoundError
from sftcli.paths import as_path
from sftcli.services.evaluate.checks.table import read_check_names
from sftcli.services.runs.folder import RunFolder, find_run


class Keep(StrEnum):
    """Which answer to a prompt becomes a row: the first that ended by itself, or the first of these that passes the checks."""

    ENDED = "ended"
    CHECK = "check"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachRequest:
    """``file`` has the prompts; ``checks`` are names as ``sft eval --check`` takes them."""

    keep: Keep
    file: Path
    checks: tuple[str, ...] = ()
    with_system: bool = True
    ignored: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()

    @property
    def check_names(self) -> tuple[str, ...]:
        """The names one by one.

        Raises:
            UsageError, NotFoundError: There is no such check.
        """
        return read_check_names(self.checks)


def held_place(name: str, root: Path) -> RunFolder | Path:
    """Return the run, or the file of rows, that ``--apart-from`` names.

    Raises:
        NotFoundError: There is neither.
    """
    path = as_path(name)
    if path.is_file():
        return path
    try:
        return find_run(name, root)
    except NotFoundError as error:
        raise NotFoundError(
            f"--apart-from {name}: there is no such file, and {error.message}", hint=error.hint
        ) from error
