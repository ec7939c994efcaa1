"""What two runs have not in common."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sftcli.services.diff.answers import Moved, moved_answers, read_answers
from sftcli.services.diff.rows import RowChanges, changed_rows
from sftcli.services.diff.settings import ChangedFact, ChangedSetting, changed_facts, changed_settings
from sftcli.services.report.evaluation import read_scores
from sftcli.services.report.measures import Compared, compare_scores
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.summary import summarize_run
from sftcli.services.runs.trained_rows import prepared_rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutLosses:
    """The newest held-out loss of both runs, nats per response token, and whether it is of the same rows."""

    before: float | None
    after: float | None
    before_rows: int
    after_rows: int
    same_rows: bool | None  # None where the rows are no longer prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs from run ``before`` to run ``after``. None stands for what cannot be told; ``notes`` say why."""

    before: str
    after: str
    rows: RowChanges | None
    settings: tuple[ChangedSetting, ...]
    facts: tuple[ChangedFact, ...]
    heldout: HeldoutLosses
    measures: tuple[Compared, ...]  # of ``eval.json``; those of ``before`` stand as the base
    answers: tuple[Moved, ...] | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self) | {
            "measures": {
                one.measure.key: {
                    "before": None if one.base is None else one.base / one.measure.scale,
                    "after": one.tuned / one.measure.scale,
                    "rows": one.rows,
                }
                for one in self.measures
            },
            "answers": None if self.answers is None else [moved.to_json() for moved in self.answers],
        }


def compare_runs(before: RunFolder, after: RunFolder) -> Difference:
    """Return what differs between two runs.

    Raises:
        NotFoundError, UsageError, DataError: One lacks its settings, or its files are damaged.
    """
    notes: list[str] = []
    settings = changed_settings(before, after)
    rows, same_heldout = _rows(before, after, notes)
    first, second = summarize_run(before), summarize_run(after)
    return Difference(
        before=before.name,
        after=after.name,
        rows=rows,
        settings=settings,
        facts=changed_facts(before, after),
        heldout=HeldoutLosses(
            before=first.heldout_loss,
            after=second.heldout_loss,
            before_rows=first.heldout_rows,
            after_rows=second.heldout_rows,
            same_rows=same_heldout,
        ),
        measures=_measures(before, after),
        answers=_answers((before, after), notes),
        notes=tuple(notes),
    )


def _rows(before: RunFolder, after: RunFolder, notes: list[str]) -> tuple[RowChanges | None, bool | None]:
    """Return what differs between the rows, and whether those held out are the same."""
    found = [prepared_rows_of(run) for run in (before, after)]
    for run, dataset in zip((before, after), found, strict=True):
        if dataset is None:
            notes.append(
                f"the rows of {run.name} are no longer prepared, so they are not compared; prepare them again: sft prepare "
                f"--config {run.config}"
            )
    first, second = found
    if first is None or second is None:
        fingerprints = [run.data_fingerprint() for run in (before, after)]
        is_same = fingerprints[0] is not None and fingerprints[0] == fingerprints[1]
        return None, True if is_same else None
    if first.about.ends != second.about.ends:
        notes.append(
            "the rows are rendered differently, by their chat template or tokenizer, so equal rows count as changed"
        )
    heldout = [sorted(digest for digest, _ in dataset.heldout.keys()) for dataset in (first, second)]  # noqa: SIM118 - no mapping
    return changed_rows(first, second), heldout[0] == heldout[1]


def _measures(before: RunFolder, after: RunFolder) -> tuple[Compared, ...]:
    first, second = read_scores(before), read_scores(after)
    if first is None or second is None:
        return ()
    return tuple(compare_scores(first.tuned.to_json(), second.tuned.to_json(), rows=second.rows))


def _answers(runs: Sequence[RunFolder], notes: list[str]) -> tuple[Moved, ...] | None:
    found = []
    for run in runs:
        answers = None if not run.evaluation.is_file() else read_answers(run.evaluation)
        if answers is None:
            notes.append(f"{run.name} has no answers to compare; score it: sft eval {run.argument}")
        found.append(answers)
    before, after = found
    if before is None or after is None:
        return None
    moved = moved_answers(before, after)
    if Counter(one.row for one in before) != Counter(one.row for one in after):
        notes.append(
            f"the scores are of other rows, so they do not compare: {runs[0].name} answered {len(before):,}, "
            f"{runs[1].name} {len(after):,}, of which {moved[0].rows if moved else 0:,} are the same"
        )
    if not moved:
        notes.append("no row was answered by both runs")
    return moved
