"""Trains the runs of a comparison one after the other, scores each, and goes on where an earlier start ended."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.errors import DivergedError, MismatchError, StoppedError
from sftcli.events import Notice, Session, Warned
from sftcli.runtime import monotonic
from sftcli.services.compare.price import Agreed, Price, agree, price
from sftcli.services.compare.record import FILE, RECORDS, Record, is_comparison, read_record, write_record
from sftcli.services.compare.score import score_run
from sftcli.services.compare.start import Child, Comparison
from sftcli.services.compare.summary import CompareReport, report_of
from sftcli.services.runs.folder import RunFolder, create_run
from sftcli.services.runs.lock import RunLock
from sftcli.services.train.lead import TrainRequest, run_training
from sftcli.services.train.resuming.changes import CHANGEABLE, SETTING, named_settings


def plan_comparison(comparison: Comparison, session: Session) -> Price:
    """Return what the runs would take. Trains nothing and writes no folder."""
    agreed = agree(comparison, session)
    nowhere = Path(comparison.base.settings.run.root) / "plan"
    return price(comparison, comparison.children(nowhere, agreed.values), {}, session)


def run_comparison(comparison: Comparison, session: Session, *, command: str) -> CompareReport:
    """Train and score all runs that are not scored yet, and return what they show.

    Raises:
        OutputError: Another process works on it.
        MismatchError: It was begun with something else.
        StoppedError: A stop was asked for; what is done stays.
    """
    agreed = agree(comparison, session)
    identity = _identity(comparison, agreed)
    folder = _opened(comparison, agreed, identity, command)
    with RunLock(folder, session.emit):
        work = _Work(comparison=comparison, agreed=agreed, folder=folder, session=session)
        work.require_same(identity)
        work.finish()
        return work.report()


def _opened(comparison: Comparison, agreed: Agreed, identity: Mapping[str, str], command: str) -> Path:
    """Return the folder of a comparison, made where there is none yet."""
    folder = comparison.folder
    if folder is not None and is_comparison(folder):
        return folder
    paths = agreed.dataset.about.paths
    record = Record(identity=identity, command=command, paths=paths, trained={}, scored={}, diverged={})
    label = f"compare-{comparison.axis.name.rpartition('.')[2]}"
    files = {FILE: RECORDS.text(record)}
    return create_run(comparison.base.settings.run, label=label, files=files).path


def _identity(comparison: Comparison, agreed: Agreed) -> dict[str, str]:
    """Return what makes a comparison another one, by name."""
    return {
        **named_settings(comparison.base.settings),
        **agreed.fingerprints,
        "axis": comparison.axis.name,
        "values": ", ".join(value.text for value in comparison.axis.values),
        "seeds": str(comparison.seeds),
        "steps": str(agreed.steps),
    }


@dataclass(slots=True, kw_only=True)
class _Work:
    """A comparison on its way."""

    comparison: Comparison
    agreed: Agreed
    folder: Path
    session: Session

    @property
    def children(self) -> list[Child]:
        """All runs, in their order."""
        return self.comparison.children(self.folder, self.agreed.values)

    def require_same(self, identity: Mapping[str, str]) -> None:
        """Make sure that the comparison was begun with what it goes on with.

        Raises:
            MismatchError: It was not.
        """
        then = named_settings(Settings()) | dict(read_record(self.folder).identity)
        changed = [
            f"{name.removeprefix(SETTING)} was {then.get(name, 'unset')[:60]}, is {now[:60]}"
            for name, now in identity.items()
            if then.get(name) != now and name.removeprefix(SETTING) not in CHANGEABLE
        ]
        if changed:
            raise MismatchError(
                f"{self.folder} was begun with something else: {'; '.join(changed)}",
                hint="go on with the same command, or begin another one with --run NAME",
            )

    def finish(self) -> None:
        """Train and score what is not scored yet."""
        record, children, emit = read_record(self.folder), self.children, self.session.emit
        for child in children:
            if child.name in record.done:
                _remove_weights(RunFolder(self.folder / child.name))  # a kill may have come before that
        left = [child for child in children if child.name not in record.done]
        if not left:
            return
        costs = price(self.comparison, children, record.scored, self.session)
        done = len(children) - len(left)
        more, runs = "more " if done else "", "run" if costs.runs == 1 else "runs"
        emit(
            Notice(
                text=f"{costs.runs} {more}{runs} of {costs.steps} steps: about {_about(costs.seconds)} in all"
            )
        )
        for number, child in enumerate(left, start=done + 1):
            text = self.comparison.axis.values[child.place].text
            emit(
                Notice(
                    text=f"run {number} of {len(children)}: {self.comparison.axis.name} {text} ({child.name})"
                )
            )
            record = self._finish_run(child, record)

    def _finish_run(self, child: Child, record: Record) -> Record:
        begin, before = monotonic(), record.trained.get(child.name, 0.0)
        run = RunFolder(self.folder / child.name)
        if child.name not in record.trained:
            try:
                self._train(child, record.command)
            except DivergedError as error:
                self.session.emit(Warned(text=f"{child.name} diverged: {error.message}"))
                return self._kept(run, record.with_diverged(child.name, error.message))
            record = record.with_trained(child.name, monotonic() - begin)
            write_record(self.folder, record)
        scores = score_run(run, self.session, seconds=before)
        scores = replace(scores, seconds=before + monotonic() - begin)
        gc.collect()  # two models
        return self._kept(run, record.with_scored(child.name, scores))

    def _kept(self, run: RunFolder, record: Record) -> Record:
        """Write down that a run is done, and take its weights away; its log and numbers stay."""
        write_record(self.folder, record)
        _remove_weights(run)
        self.session.emit(Notice(text=f"{run.name} is done; its weights are removed, its log stays"))
        return record

    def _train(self, child: Child, command: str) -> None:
        request = TrainRequest(resolved=child.resolved, label=child.name, command=command, auto=True)
        outcome = run_training(request, self.session)
        gc.collect()  # the model that was trained
        if outcome.final is None:
            raise StoppedError

    def report(self) -> CompareReport:
        """Return what the scores show."""
        record, children = read_record(self.folder), self.children
        names = [
            [child.name for child in children if child.place == place]
            for place in range(len(self.comparison.by_value))
        ]
        return report_of(
            self.comparison.axis,
            [[record.scored.get(name) for name in of_value] for of_value in names],
            folder=str(self.folder),
            names=names,
            paths=record.paths,
            steps=self.agreed.steps,
            diverged=record.diverged,
        )


def _remove_weights(run: RunFolder) -> None:
    if not run.has_lost_weights:
        run.note(weights_removed=True)
    for path in (run.final, run.checkpoints):
        if path.exists():
            storage.try_remove_tree(path)


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
