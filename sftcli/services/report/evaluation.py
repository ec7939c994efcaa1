"""``eval.json``: what ``sft eval`` has found about a run, for page, card and all who compare with it."""

from dataclasses import asdict, dataclass, fields

from sftcli import storage
from sftcli.json_files import replace_json
from sftcli.own_files import OwnFile
from sftcli.services.diagnosis.verdict import Verdict
from sftcli.services.report.check_results import CheckResult, GradedRow
from sftcli.services.report.confidence import Confidence
from sftcli.services.report.score import Answered, AnsweredRow, Forgetting, Interval, Miss, Score, TriedWay
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.overlap import TrainedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of the tuned model and, where one was named, of the base, with the difference over the same rows."""

    rows: int
    is_heldout: bool = True  # of the run that made the model; else the rows were named
    trained_on: TrainedRows | None = None  # of these rows; None where that is not known
    cut_rows: int = (
        0  # their last answer has no end, so no answer is compared with it; they have loss as any other
    )
    tuned: Score
    base: Score | None = None
    loss_difference: Interval | None = None  # tuned minus base, nats per response token
    match_difference: Interval | None = None  # tuned minus base, fraction
    forgetting: Forgetting | None = None  # on general text, where that was asked for
    verdict: Verdict | None = None  # of the run that made the model, with its own rows
    samples: tuple[AnsweredRow, ...] = ()
    misses: tuple[Miss, ...] = ()
    answers: tuple[Answered, ...] | None = (
        None  # all rows that were answered; None where an older version did not keep them
    )
    checks: tuple[CheckResult, ...] = ()
    graded: tuple[GradedRow, ...] = ()  # by every check
    confidence: Confidence | None = (
        None  # of the tuned model's answers; None where an older version did not keep it
    )

    tried: tuple[
        TriedWay, ...
    ] = ()  # the base with and without examples, then the tuned model, where that was asked for

    @property
    def differences(self) -> tuple[Interval | None, Interval | None, Interval | None]:
        """Tuned minus base: of the loss, of exact matches, and of the loss of general text."""
        general = None if self.forgetting is None else self.forgetting.difference
        return self.loss_difference, self.match_difference, general

    def to_json(self) -> dict[str, object]:
        """Return the scores as plain values, with what follows from them."""
        found = asdict(self)
        return {one.name: found[one.name] for one in fields(Evaluation)} | {
            "tuned": self.tuned.to_json(),
            "base": None if self.base is None else self.base.to_json(),
        }


EVALUATIONS = OwnFile(form=Evaluation, hint="score the model again: sft eval RUN")


def read_scores(run: RunFolder) -> Evaluation | None:
    """Return what ``sft eval`` has written about ``run``; None where it has not.

    Raises:
        DataError: The file is damaged.
    """
    return EVALUATIONS.find(run.evaluation)


def write_scores(run: RunFolder, found: Evaluation) -> None:
    """Keep ``found`` with ``run``, for ``read_scores``."""
    replace_json(run.evaluation, {"format": EVALUATIONS.version, **found.to_json()}, kind=storage.OUTPUT)
