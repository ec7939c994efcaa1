"""Score a model on held-out rows, beside the model it came from."""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftcli.config.auto import with_values
from sftcli.config.layers import Override
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import Precision
from sftcli.data.batches.progress import Stages
from sftcli.data.prepared.store import ExampleTable
from sftcli.errors import DataError, UsageError
from sftcli.events import EventSink, Notice, Session, unheard
from sftcli.extras import install_command
from sftcli.modeling.config_values import positions_of
from sftcli.modeling.formats.identity import answering_hash
from sftcli.services.diagnosis.judge import judge_run
from sftcli.services.diagnosis.verdict import Verdict
from sftcli.services.diff.answers import EXACT, identity_of
from sftcli.services.evaluate.checks import json_text, pattern, tool
from sftcli.services.evaluate.checks.check import AskedRow, Check
from sftcli.services.evaluate.checks.grading import Checked, check_answers, numbers_of
from sftcli.services.evaluate.checks.rows import with_rows
from sftcli.services.evaluate.checks.table import find_checks, line_of
from sftcli.services.evaluate.checks.tool import has_schemas
from sftcli.services.evaluate.confidence import FEWEST_ROWS, find_cuts
from sftcli.services.evaluate.general import GeneralRows, forgotten, general_rows
from sftcli.services.evaluate.limits import FORGETTING, require_checked
from sftcli.services.evaluate.metrics import TrainingSpans, has_reference_metrics
from sftcli.services.evaluate.request import KEPT_PRECISION, EvalRequest, no_heldout_of
from sftcli.services.evaluate.rows import rows_with_room, rows_with_whole_answers, spread
from sftcli.services.evaluate.scoring import (
    STAGES,
    Scored,
    ScoringJob,
    asked_rows,
    loss_difference,
    match_difference,
    question_of,
    samples_of,
    score_model,
)
from sftcli.services.evaluate.trial.beside import ask_base, set_beside
from sftcli.services.evaluate.trial.trial import (
    MAX_PROMPT_TOKENS,
    TrialPrompts,
    TrialRequest,
    Way,
    rows_with_messages,
)
from sftcli.services.models.choose import ModelChoice, base_of, choose_model
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.doubts import more_heldout
from sftcli.services.prepare.prepare import PreparedData, prepare_rows
from sftcli.services.processes.peers import Peers, joined
from sftcli.services.processes.rank import find_place
from sftcli.services.report.check_results import CheckResult
from sftcli.services.report.confidence import Confidence
from sftcli.services.report.evaluation import Evaluation, write_scores
from sftcli.services.report.html import write_report
from sftcli.services.report.measures import Compared, measures_of
from sftcli.services.report.score import Answered
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.lock import EvaluationLock
from sftcli.services.runs.summary import RunHistory
from sftcli.services.runs.trained_rows import are_rows_of, count_trained, prepared_rows_of

if TYPE_CHECKING:
    from sftcli.services.evaluate.tasks import TasksRequest

KEPT_SAMPLES = 8
MAX_TRAINING_TOKENS = 2_000_000  # looked through for copied answers


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport(Evaluation):
    """An evaluation as it was made just now."""

    answers: tuple[Answered, ...]
    confidence: Confidence
    more_answers: str  # how enough rows are answered for cuts; "" where they are
    page: str | None = None  # that shows these scores; None where they are not kept with a run

    @property
    def is_kept(self) -> bool:
        """Whether it is of a kind that is kept with the run: of its own rows, in one precision."""
        return self.is_heldout and self.confidence.precision == KEPT_PRECISION

    def compared(self) -> list[Compared]:
        """Return the scores side by side, for people."""
        return measures_of(self)

    def numbers(self) -> dict[str, float]:
        """Return the numbers of the tuned model."""
        return (
            {
                name: float(value)
                for name, value in self.tuned.to_json().items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            | numbers_of(self.checks)
            | self._forgetting_number()
        )

    def _forgetting_number(self) -> dict[str, float]:
        return {} if self.forgetting is None else {FORGETTING: self.forgetting.difference.value}


_Found = tuple[ModelChoice, Settings, PreparedData, ModelChoice | None]


def run_evaluation(request: EvalRequest, session: Session) -> EvalReport:
    """Score the model, and the base if one is named, on the same held-out rows.

    Raises:
        DataError: No row is held out, or the answer of every one is cut.
        OutputError: The scores are to be kept with the run, and another process scores it.
    """
    with joined(find_place(os.environ), session.emit) as peers, ExitStack() as held:

        def find() -> _Found:
            found = _find(request, session)
            run = found[0].run
            if run is not None and request.is_kept and peers.group.is_writer:
                held.enter_context(EvaluationLock(run, session.emit))
            return found

        return _evaluate(request, session, peers, *peers.rank_zero_first(find, session.stop))


def _evaluate(
    request: EvalRequest,
    session: Session,
    peers: Peers,
    choice: ModelChoice,
    settings: Settings,
    prepared: PreparedData,
    base: ModelChoice | None,
) -> EvalReport:
    emit, stop = session.emit, session.stop
    trained = _trained_rows(choice, prepared, request, emit)
    heldout = prepared.dataset.heldout
    if not len(heldout):
        raise DataError("there are no held-out rows to score", hint="name rows with --data FILE")
    if not has_reference_metrics():
        needed = install_command("eval", "rouge-score", "sacrebleu")
        emit(Notice(text=f"ROUGE-L and chrF are skipped; they need: {needed}"))
    whole = rows_with_whole_answers(heldout, named="--data FILE")
    if cut := len(heldout) - len(whole):
        emit(
            Notice(
                text=f"held-out rows with a truncated answer: {cut}; they count toward loss and are not answered"
            )
        )
    models = [choice] if base is None else [base, choice]
    limits = [positions for one in models if (positions := positions_of(one.weights_folder))]
    answered = rows_with_room(heldout, whole, min(limits, default=0), emit)
    job = ScoringJob(
        heldout=heldout,
        questions=[
            question_of(heldout[answered[place]], prepared.tokenizer)
            for place in spread(len(answered), request.max_rows)
        ],
        tokenizer=prepared.tokenizer,
        sampling=settings.sampling,
        batch_rows=request.batch_size,
        training=None if trained is None else TrainingSpans(_training_answers(trained, emit)),
        peers=peers,
        general=_general_rows(request, choice, base, min(limits, default=0)),
    )
    checks, asked = _find_checks(job, settings, request, emit)
    precision, stages = request.precision, Stages(STAGES if base is None else STAGES * 2, emit)
    base_score = (
        None if base is None else score_model(job, base, emit, stop, precision=precision, stages=stages)
    )
    prompts, ways = _with_examples(request, settings, prepared, base, session)
    tuned = score_model(job, choice, emit, stop, precision=precision, stages=stages)
    checked = check_answers(checks, asked, None if base_score is None else base_score.answers, tuned.answers)
    answers = _answers(job, tuned, checked)
    report = EvalReport(
        rows=len(heldout),
        is_heldout=not request.data,
        trained_on=None if trained is None else count_trained(trained, heldout),
        cut_rows=len(heldout) - len(whole),
        tuned=tuned.score,
        base=None if base_score is None else base_score.score,
        loss_difference=None if base_score is None else loss_difference(base_score, tuned),
        match_difference=None if base_score is None else match_difference(base_score, tuned),
        forgetting=None
        if job.general is None or base_score is None
        else forgotten(job.general, base_score.general, tuned.general),
        verdict=None if choice.run is None or request.data else _verdict(choice.run),
        samples=samples_of(job, base_score, tuned, most=KEPT_SAMPLES),
        misses=tuned.misses,
        answers=answers,
        confidence=_confidence(choice, answers, checked, precision),
        checks=checked.results,
        graded=checked.rows,
        tried=()
        if prompts is None or base_score is None
        else set_beside(
            prompts, ways, job, base=base_score, tuned=tuned, check=next(iter(checks), None), rows=asked
        ),
        more_answers=_more_answers(request, settings, prepared, whole=len(answered)),
    )
    is_of_run = choice.run is not None and not request.data
    if is_of_run and precision != KEPT_PRECISION:
        emit(
            Notice(
                text=f"scores in {precision} are not kept with the run: its page and card have those in float32"
            )
        )
    elif choice.run is not None and is_of_run and peers.group.is_writer:
        write_scores(choice.run, report)
        write_report([choice.run], choice.run.report)
        return replace(report, page=str(choice.run.report))
    return report


def _with_examples(
    request: EvalRequest,
    settings: Settings,
    prepared: PreparedData,
    base: ModelChoice | None,
    session: Session,
) -> tuple[TrialPrompts | None, tuple[Way, ...]]:
    """Ask the base with examples in its prompts, where that is asked for.

    Raises:
        UsageError: There is no base.
    """
    if request.shots is None:
        return None, ()
    if base is None:
        raise UsageError("--try asks the base, and none is known", hint="name it: --base MODEL")
    trial = TrialRequest(
        settings=settings,
        shots=request.shots,
        max_rows=request.max_rows,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        precision=request.precision,
        batch_size=request.batch_size,
    )
    return ask_base(trial, base, prepared, session)


def _general_rows(
    request: EvalRequest, choice: ModelChoice, base: ModelChoice | None, most_tokens: int
) -> GeneralRows | None:
    """Return the general text, where it is asked what the model has forgotten.

    Raises:
        UsageError: There is no base.
    """
    if not request.asks_forgetting:
        return None
    if base is None:
        raise UsageError(
            "what a model has forgotten shows beside its base, and none is known",
            hint="name it: --base MODEL; or leave --forgetting and its limit out",
        )
    return general_rows(choice.tokenizer_folder, most_tokens=most_tokens)


def _more_answers(request: EvalRequest, settings: Settings, prepared: PreparedData, *, whole: int) -> str:
    """Return how enough of the rows are answered for cuts, where only ``whole`` rows can be; nothing where they are."""
    longer = "" if request.max_rows >= FEWEST_ROWS else f"--max-rows {FEWEST_ROWS}"
    if whole >= FEWEST_ROWS:
        return longer and f"to answer more: {longer}"
    heldout = len(prepared.dataset.heldout)
    more = (
        "name more rows with --data"
        if request.data
        else more_heldout(
            settings,
            math.ceil(FEWEST_ROWS * heldout / whole),
            of=len(prepared.dataset.train) + heldout,
        )
    )
    return f"{more}, then {longer}" if longer else more


def _answers(job: ScoringJob, tuned: Scored, checked: Checked) -> tuple[Answered, ...]:
    """Return every answered row with whether it was right, exactly and by each check."""
    right = {EXACT: list(tuned.matches)} | {
        _measure_of(check): [row.tuned.score == 1 for row in checked.rows if row.check == check.name]
        for check in checked.results
    }
    return tuple(
        Answered(
            origin=question.origin,
            row=identity_of(job.tokenizer.decode(question.prompt_ids, skip_special=True), question.expected),
            passed={measure: found[place] for measure, found in right.items()},
            confidence=tuned.confidences[place],
            logprob=tuned.logprobs[place],
        )
        for place, question in enumerate(job.questions)
    )


def _measure_of(check: CheckResult) -> str:
    """Return what tells a check from others in evaluations that are compared later: the name, and of a pattern the pattern."""
    return f"{check.name}:{check.about}" if check.name == pattern.NAME else check.name


def _confidence(
    choice: ModelChoice, answers: Sequence[Answered], checked: Checked, precision: str
) -> Confidence:
    """Return the cuts of ``answers``, right by the first check that compares with the expected answer, if there is one."""
    blind = (EXACT, json_text.NAME, pattern.NAME)  # the last two look at the answer alone
    compared = [measure for measure in answers[0].passed if measure.partition(":")[0] not in blind]
    measure = compared[0] if compared else EXACT
    right = [answer.passed[measure] for answer in answers]
    if (
        measure == tool.NAME
    ):  # which grades no words: where no call is expected, they have to be the expected ones
        called = [tool.NAMES in row.tuned.parts for row in checked.rows if row.check == tool.NAME]
        right = [
            is_right and (calls or answer.passed[EXACT])
            for is_right, calls, answer in zip(right, called, answers, strict=True)
        ]
    return Confidence(
        model=choice.name if choice.run is None else choice.run.inside(choice.folder),
        model_hash=answering_hash(choice.folder),
        measure=measure,
        precision=Precision(precision),
        rows=len(answers),
        cuts=find_cuts([answer.confidence for answer in answers], right),
    )


def _find(request: EvalRequest, session: Session) -> _Found:
    """Return the model, its settings, the rows, and the model to compare with."""
    emit = session.emit
    choice = model_of(request, emit)
    settings = _settings_of(choice, request)
    if request.shots is not None:
        prepared = rows_with_messages(settings, choice, session)
    else:
        prepared = prepare_rows(settings, model_folder=choice.tokenizer_folder, session=session)
        require_room(prepared, choice.weights_folder, emit)
    base = base_to_compare(choice, request, emit)
    if base is not None:
        require_room(prepared, base.weights_folder, unheard)  # what it could tell is told of the tuned model
    return choice, settings, prepared, base


def _find_checks(
    job: ScoringJob, settings: Settings, request: EvalRequest, emit: EventSink
) -> tuple[tuple[Check, ...], list[AskedRow]]:
    """Return the checks that are asked for, or fit, and what they grade; the first is told.

    Raises:
        DataError, UsageError: A check, or a limit of one, does not fit these rows.
    """
    asked = asked_rows(job)
    checks = find_checks(request.checks, asked)
    require_checked(request.limits, checks)
    for check in checks:
        emit(Notice(text=line_of(check)))
    if any(check.needs_rows for check in checks):
        asked = with_rows(asked, settings)
    for check in checks:
        check.grade(asked[0].expected, asked[0])  # a function that fails does so before minutes of answering
    if any(row.tools for row in asked) and not has_schemas():
        needed = install_command("eval", "jsonschema")
        emit(Notice(text=f"calls are not compared with the JSON schema of their tools; that needs: {needed}"))
    return checks, asked


def _verdict(run: RunFolder) -> Verdict:
    return judge_run(run, RunHistory(read_events(run)))


def _trained_rows(
    choice: ModelChoice, prepared: PreparedData, request: EvalRequest, emit: EventSink
) -> ExampleTable | None:
    """Return the rows that the model was trained on; None where they are not known, which is said."""
    if choice.run is None:
        return None
    if not request.data and are_rows_of(choice.run, prepared.dataset, emit):
        return prepared.dataset.train
    found = prepared_rows_of(choice.run)
    if found is None and not request.data:
        return prepared.dataset.train
    if found is None:
        emit(
            Notice(
                text=f"the rows that {choice.run.name} was trained on are no longer cached, so overlap with these is not "
                f"checked; prepare them again: sft eval {choice.run.argument}"
            )
        )
        return None
    return found.train


def _training_answers(trained: ExampleTable, emit: EventSink) -> list[list[int]]:
    """Return the trained tokens of training rows, at most ``MAX_TRAINING_TOKENS`` of them."""
    rows, tokens = [], 0
    for index in range(len(trained)):
        example = trained[index]
        rows.append(example.input_ids[example.loss_mask].tolist())
        tokens += len(rows[-1])
        if tokens >= MAX_TRAINING_TOKENS:
            emit(Notice(text=f"memorization is checked in the first {index + 1} training rows"))
            break
    return rows


def _settings_of(choice: ModelChoice, request: EvalRequest) -> Settings:
    """Return the settings of the run that made the model, with the rows of ``request`` where it names some."""
    overrides = []
    if request.data:
        overrides.append(Override(key="data.sources", value=[], origin="--data"))
        overrides.append(Override(key="data.heldout_sources", value=list(request.data), origin="--data"))
        # What the rows of the training were chosen by is nothing to these.
        overrides += [
            Override(key=f"data.{key}", value=value, origin="--data")
            for key, value in (
                ("where", []),
                ("fixes", None),
                ("leave_out", []),
                ("train_share", 1.0),
                ("duplicates", "keep"),
                ("near_duplicates", "keep"),
            )
        ]
    elif choice.run is None:
        raise no_heldout_of(choice.name)
    settings = (
        resolve(preset=None, config_file=None, overrides=overrides, environ={}).settings
        if choice.run is None
        else read_settings(choice.run, overrides)
    )
    ignored = tuple(dict.fromkeys((*settings.data.ignored_keys, *request.ignored)))
    return with_values(settings, {"data.ignored_keys": ignored})


def model_of(request: "EvalRequest | TasksRequest", emit: EventSink) -> ModelChoice:
    """Return the model that is scored."""
    return choose_model(
        request.checkpoint,
        tokenizer=request.tokenizer,
        root=request.root,
        emit=emit,
        trusts_code=request.trusts_code,
        base_model=request.base_model,
    )


def base_to_compare(
    choice: ModelChoice, request: "EvalRequest | TasksRequest", emit: EventSink
) -> ModelChoice | None:
    """Return the model beside which ``choice`` is scored: the one that was named, else the one it was made from; or none."""
    if not request.with_base:
        return None
    if request.base is not None:
        return choose_model(request.base, root=request.root, emit=emit)
    return base_of(choice, emit, trusts_code=request.trusts_code, named=request.base_model)
