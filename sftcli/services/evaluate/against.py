"""An evaluation set against an earlier one: are the answers to the same rows worse, by more than chance?"""

from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import DataError, UsageError
from sftcli.paths import as_path
from sftcli.services.diff.answers import Moved, moved_answers, read_answers
from sftcli.services.report.score import Answered
from sftcli.services.runs.folder import find_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The answers of an earlier evaluation."""

    path: str
    answers: tuple[Answered, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What became of the answers of an earlier evaluation, by measure."""

    path: str
    answers: tuple[Moved, ...]

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return {"file": self.path, "answers": [moved.to_json() for moved in self.answers]}

    def worse(self) -> list[str]:
        """Return in words what is worse by more than chance."""
        return [f"{moved}: worse than {self.path}" for moved in self.answers if moved.is_worse]


def read_earlier(name: str, root: Path) -> Earlier:
    """Return the evaluation in the file ``name``, or that of the run of this name.

    Raises:
        NotFoundError, DataError: There is none, or it cannot be read.
        UsageError: It does not tell its answers.
    """
    path = as_path(name)
    if not (path.is_file() or name.endswith(".json")):
        path = find_run(name, root).evaluation
    answers = read_answers(path)
    if answers is None:
        raise UsageError(
            f"{path} is of a version that did not keep which rows were answered right",
            hint="score that model again with sft eval",
        )
    return Earlier(path=str(path), answers=answers)


def set_against(earlier: Earlier, answers: tuple[Answered, ...]) -> Against:
    """Return what became of the answers of ``earlier``.

    Raises:
        DataError: It has none to these rows.
    """
    found = moved_answers(earlier.answers, answers)
    if not found:
        raise DataError(
            f"{earlier.path} has no answer to any of these rows, so there is nothing to compare",
            hint="score both models on the same rows: sft eval RUN --data FILE",
        )
    return Against(path=earlier.path, answers=found)
