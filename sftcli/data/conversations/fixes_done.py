"""A fix, and what became of fixes, as values that are kept. They stand apart so that whoever reads them loads nothing else."""

from dataclasses import dataclass
from typing import Literal

from sftcli.figures import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """What was decided about a row. ``answer`` takes the place of its last trained one."""

    row: str
    fix: Literal["leave-out", "replace", "keep"]
    answer: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixesDone:
    """What became of fixes. ``missing`` ones name a row that was not read; ``changed`` are the files where it had stood."""

    left_out: int = 0
    replaced: int = 0
    kept: int = 0
    missing: int = 0
    changed: tuple[str, ...] = ()

    def in_words(self) -> str:
        """Return it in a line."""
        files = f" ({', '.join(self.changed)} changed)" if self.changed else ""
        parts = {
            f"{counted(self.left_out, 'row')} left out": self.left_out,
            f"{counted(self.replaced, 'answer')} replaced": self.replaced,
            f"{self.kept:,} kept": self.kept,
            f"{self.missing:,} no longer found{files}": self.missing,
        }
        return ", ".join(text for text, count in parts.items() if count) or "nothing is changed"
