"""``compare.json``: what a comparison is of, and what is done of it.

runs/NAME/
  compare.json    what is compared, and of each run its scores, row by row, once it is scored
  VALUE/          an ordinary run each; its weights are removed when it is scored
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from sftcli.errors import DataError
from sftcli.own_files import OwnFile
from sftcli.paths import PathText

FILE = "compare.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """What a run was measured to have on each held-out row: nats, response tokens and bytes of response text.

    ``ids`` tell a row from every other: its place, and which example of that place it is.
    """

    ids: tuple[str, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]
    train_rows: int  # that the run was trained on
    seconds: float  # that training and scoring took

    def __post_init__(self) -> None:
        """Refuse numbers that are not of the rows."""
        lengths = {len(part) for part in (self.ids, self.nll, self.tokens, self.num_bytes)}
        if len(lengths) > 1 or len(set(self.ids)) < len(self.ids):
            raise ValueError("has not one number for each row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What ``compare.json`` holds.

    Attributes:
        identity: What must be the same when it goes on, by name.
        command: What was typed.
        paths: The files of each source.
        trained: Names of the runs that are trained and not yet scored, with the seconds that it took.
        scored: The scores of those that are.
        diverged: What was said of those that diverged.
    """

    identity: Mapping[str, str]
    command: str
    paths: Mapping[str, tuple[PathText, ...]]
    trained: Mapping[str, float]
    scored: Mapping[str, RowScores]
    diverged: Mapping[str, str]

    @property
    def done(self) -> frozenset[str]:
        """Names of the runs of which nothing is left to do."""
        return frozenset((*self.scored, *self.diverged))

    def with_trained(self, name: str, seconds: float) -> Self:
        """Return the same once a run is trained."""
        return replace(self, trained={**self.trained, name: seconds})

    def with_scored(self, name: str, scores: RowScores) -> Self:
        """Return the same once a run is scored."""
        trained = {one: seconds for one, seconds in self.trained.items() if one != name}
        return replace(self, trained=trained, scored={**self.scored, name: scores})

    def with_diverged(self, name: str, why: str) -> Self:
        """Return the same once a run has diverged."""
        return replace(self, diverged={**self.diverged, name: why})


RECORDS = OwnFile(form=Record, hint="choose another name with --run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a comparison is: its name, path, what it compares, and how many of its runs are done."""

    name: str
    path: str
    axis: str
    done: int
    runs: int


def list_comparisons(root: Path) -> list[Progress]:
    """Return the comparisons under ``root`` by name; one that cannot be read is left out."""
    found = []
    for file in sorted(root.glob(f"[!.]*/{FILE}")):
        try:
            record = read_record(file.parent)
            axis, values, seeds = (record.identity[name] for name in ("axis", "values", "seeds"))
            runs = len(values.split(", ")) * int(seeds)
        except (DataError, KeyError, ValueError):
            continue
        done = len(record.done)
        found.append(Progress(name=file.parent.name, path=str(file.parent), axis=axis, done=done, runs=runs))
    return found


def is_comparison(folder: Path) -> bool:
    """Return whether a comparison is kept in ``folder``."""
    return (folder / FILE).is_file()


def read_record(folder: Path) -> Record:
    """Return what is kept in ``folder``.

    Raises:
        DataError: It is damaged.
    """
    return RECORDS.read(folder / FILE)


def write_record(folder: Path, record: Record) -> None:
    """Keep ``record`` in ``folder``, whole or not at all."""
    RECORDS.write(folder / FILE, record)
