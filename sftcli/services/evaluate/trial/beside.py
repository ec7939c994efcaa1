"""The base asked with training rows as examples, beside the tuned model that is asked without: what a training is worth over a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sftcli.events import Session
from sftcli.services.evaluate.checks.check import AskedRow, Check
from sftcli.services.evaluate.checks.grading import Answers, grades_of
from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.evaluate.scoring import Scored, ScoringJob
from sftcli.services.evaluate.trial.trial import ALONE, TrialPrompts, TrialRequest, Way, ask, make_prompts
from sftcli.services.models.choose import ModelChoice
from sftcli.services.prepare.prepare import PreparedData
from sftcli.services.report.score import Interval
from sftcli.services.report.tried import TUNED, TriedWay


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What one way gave, by question of the trial."""

    matches: tuple[bool, ...]
    cut: tuple[bool, ...]
    scores: tuple[float, ...] | None


def ask_base(
    request: TrialRequest, base: ModelChoice, prepared: PreparedData, session: Session
) -> tuple[TrialPrompts, tuple[Way, ...]]:
    """Ask ``base`` in each way with examples; return all prompts, those without examples too.

    Raises:
        DataError, UsageError, StoppedError: As ``run_trial``.
    """
    prompts = make_prompts(request, base, prepared, session)
    shown = {name: made for name, made in prompts.ways.items() if name != ALONE}
    return prompts, tuple(ask(request, base, prepared, replace(prompts, ways=shown), session))


def set_beside(
    prompts: TrialPrompts,
    ways: Sequence[Way],
    job: ScoringJob,
    *,
    base: Scored,
    tuned: Scored,
    check: Check | None,
    rows: Sequence[AskedRow],
) -> tuple[TriedWay, ...]:
    """Return the base in each way, then the tuned model, on the questions of ``prompts``, which are some of those of ``job``."""
    places = {(one.origin, one.prompt_ids): place for place, one in enumerate(job.questions)}
    alone = prompts.ways[ALONE]
    chosen = [places[one.question.origin, one.question.prompt_ids] for one in alone]
    asked = [rows[place] for place in chosen]

    def graded(answers: Answers, matches: Sequence[bool]) -> _Asked:
        grades = None if check is None else grades_of(check, asked, answers)
        return _Asked(
            matches=tuple(matches),
            cut=tuple(answers.cut),
            scores=None if grades is None else tuple(grade.score for grade in grades),
        )

    def of_evaluation(scored: Scored) -> _Asked:
        answers = Answers(
            texts=[scored.texts[place] for place in chosen], cut=[scored.cut[place] for place in chosen]
        )
        return graded(answers, [scored.matches[place] for place in chosen])

    last = of_evaluation(tuned)
    found = {ALONE: of_evaluation(base)} | {
        way.name: graded(Answers(texts=way.texts, cut=way.cuts), way.matches) for way in ways
    }
    about = {way.name: way for way in ways}
    tokens = sum(len(one.question.prompt_ids) for one in alone) / len(alone)

    def line(name: str, model: str, one: _Asked) -> TriedWay:
        way = about.get(name)
        return TriedWay(
            name=name,
            model=model,
            answered=len(one.matches),
            matched=sum(one.matches),
            difference=None if one is last else _difference(one.matches, last.matches),
            check="" if check is None else check.name,
            score=None if one.scores is None else sum(one.scores) / len(one.scores),
            score_difference=None
            if one is last or one.scores is None or last.scores is None
            else _difference(one.scores, last.scores),
            mean_shots=way.mean_shots if way else 0.0,
            mean_prompt_tokens=way.mean_prompt_tokens if way else tokens,
            cut=sum(one.cut),
            seconds=way.seconds if way else None,
        )

    return (
        *(line(name, base.score.model, one) for name, one in found.items()),
        line(TUNED, tuned.score.model, last),
    )


def _difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    return paired_difference(first, second, [1] * len(first))
