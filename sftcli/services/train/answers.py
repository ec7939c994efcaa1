"""What the model says during a training: the same held-out prompts answered at each evaluation, and graded as ``sft eval`` grades."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import BestBy
from sftcli.errors import DataError, Location, SftError, StoppedError, UsageError
from sftcli.events import EventSink, GivenAnswer, HeldoutAnswers, NeverStop, Notice, Progressed, StopFlag
from sftcli.figures import counted, percent
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import Decoder, decoder_in_training
from sftcli.modeling.decoding.kv_cache import turns_by_length
from sftcli.runtime import body_of, monotonic
from sftcli.services.diff.answers import EXACT
from sftcli.services.evaluate.checks.check import AskedRow, Check
from sftcli.services.evaluate.checks.grading import grades_of
from sftcli.services.evaluate.checks.rows import with_rows
from sftcli.services.evaluate.checks.table import AUTO, find_checks, line_of
from sftcli.services.evaluate.rows import rows_with_whole_answers, spread
from sftcli.services.evaluate.scoring import (
    Answered,
    HeldoutQuestion,
    ScoringJob,
    answer_questions,
    asked_rows,
    question_of,
)
from sftcli.services.processes.peers import Peers
from sftcli.services.report.check_results import Grade
from sftcli.services.train.build import TrainingParts
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.trainer import Trainer

SHOWN = 8  # answers that are kept as text
MOST_PROMPT = 1000  # characters of the end of a prompt that are kept beside its answer
CHECKED_ROWS = 200  # whose expected answers a check has to fit: those that ``sft eval`` answers unasked
CHEAP = 0.05  # of the training's time
_ROWS_AT_ONCE = 8  # answered together: their keys and values lie beside the optimizer
_TRIED = 4  # tokens of each answer that are timed
_KEY = "training.eval_answers"


def find_answers(
    inputs: TrainingInputs, parts: TrainingParts, peers: Peers, emit: EventSink
) -> "HeldoutQuestions | None":
    """Return what answers held-out prompts during a training; None where nothing does.

    Raises:
        DataError, UsageError: Answers are asked for and cannot be had, or the best checkpoint is chosen by a check and none fits.
    """
    settings, heldout = inputs.settings, inputs.prepared.dataset.heldout
    training = settings.training
    if not training.num_answers or not len(heldout):  # which is refused earlier where it matters
        return None
    if why := _obstacle(parts):
        _refuse_or_tell(settings, why, emit)
        return None
    try:
        whole = rows_with_whole_answers(heldout, named="--heldout FILE")
    except DataError:
        if training.answers_if_cheap:
            return None
        raise
    tokenizer = inputs.prepared.tokenizer

    def asked(numbers: Sequence[int]) -> tuple[ScoringJob, list[AskedRow]]:
        job = ScoringJob(
            heldout=heldout,
            questions=[question_of(heldout[whole[number]], tokenizer) for number in numbers],
            tokenizer=tokenizer,
            sampling=settings.sampling,
            training=None,
            batch_rows=_ROWS_AT_ONCE,
            peers=peers,
        )
        return job, asked_rows(job)

    fitted = asked(spread(len(whole), max(CHECKED_ROWS, training.num_answers)))[1]
    check = next(iter(find_checks((AUTO,), fitted)), None)
    if check is None and training.metric_for_best is BestBy.CHECK:
        raise UsageError(
            f"training.metric_for_best is check, and no check fits the {counted(len(fitted), 'expected answer')}",
            hint="leave it out: the lowest held-out loss decides then",
            location=Location(key="training.metric_for_best"),
        )
    job, rows = asked(spread(len(whole), training.num_answers))
    if check is not None:
        check, rows = _with_rows(check, rows, settings, emit)
    return HeldoutQuestions(
        job=job,
        rows=rows,
        check=check,
        trainer=parts.trainer,
        parts=parts,
        tokens_per_row=fmean(inputs.prepared.dataset.train.num_tokens),
        emit=emit,
    )


def _obstacle(parts: TrainingParts) -> str:
    """Return why the model in training cannot be asked; nothing where it can."""
    if parts.trainer.weights.is_sharded:
        return "each process holds a part of the weights"
    if turns_by_length(parts.model):
        return "the longest text so far would decide the rotary positions of the next step"
    return ""


def _refuse_or_tell(settings: Settings, why: str, emit: EventSink) -> None:
    if settings.training.metric_for_best is BestBy.CHECK:
        raise UsageError(
            f"training.metric_for_best is check, and held-out prompts cannot be answered: {why}",
            hint="leave it out: the lowest held-out loss decides then",
            location=Location(key="training.metric_for_best"),
        )
    emit(Notice(text=f"held-out prompts are not answered at evaluations: {why}"))


def _with_rows(
    check: Check, rows: list[AskedRow], settings: Settings, emit: EventSink
) -> tuple[Check | None, list[AskedRow]]:
    """Return what is graded, with all that ``check`` looks at; without it where the files can no longer be read."""
    if not check.needs_rows:
        return check, rows
    try:
        return check, with_rows(rows, settings)
    except SftError as error:
        if settings.training.metric_for_best is BestBy.CHECK:
            raise
        emit(Notice(text=f"check {check.name} is left out, for it needs the rows: {error.message}"))
        return None, rows


@dataclass(slots=True, kw_only=True)
class HeldoutQuestions:
    """The held-out prompts of a training with what grades their answers; all of its processes share them."""

    job: ScoringJob
    rows: list[AskedRow]
    check: Check | None
    trainer: Trainer
    parts: TrainingParts
    tokens_per_row: float  # of a training row, on average
    emit: EventSink
    _decoder: Decoder | None = field(default=None, init=False)

    @property
    def measure(self) -> str:
        """The check, or exact match where none fits."""
        return EXACT if self.check is None else self.check.name

    @property
    def decoder(self) -> Decoder:
        """What decodes with the model in training; chosen once, and not before it is needed."""
        if self._decoder is None:
            self._decoder = decoder_in_training(self.parts.model)
        return self._decoder

    def is_cheap(self, *, evaluations: int) -> bool:
        """Return whether answers are asked for, or take little of the training's time by ``evaluations``; it is told."""
        questions = counted(len(self.job.questions), "held-out prompt")
        told = f"{questions} answered at each evaluation"
        if not self.trainer.settings.answers_if_cheap:
            self._tell(told)
            return True
        group = self.trainer.group
        share = self._seconds() * evaluations / self._training_seconds() if group.is_writer else 0.0
        (share,) = group.sum([share])
        if share <= CHEAP:
            self._tell(f"{told}: about {percent(share)} of the training's time")
            return True
        self.emit(
            Notice(
                text=f"held-out prompts are not answered at evaluations, which would take about {percent(share)} of the training's "
                f"time; to ask for it: --set {_KEY}={len(self.job.questions)}"
            )
        )
        return False

    def __call__(self, stop: StopFlag, /) -> HeldoutAnswers | None:
        """Answer and grade; None when ``stop`` was set before the end. Several processes go on to the end."""
        try:
            answered = answer_questions(
                self.job,
                self.decoder,
                "answering",
                self.emit,
                stop if self.trainer.group.size == 1 else NeverStop(),
            )
        except StoppedError:
            return None
        finally:
            total = len(self.trainer.group.share(self.rows))
            self.emit(Progressed(task="answering", done=total, total=total))
        grades = self._grades(answered)
        return HeldoutAnswers(
            measure=self.measure,
            rows=len(grades),
            right=sum(grade.score == 1 for grade in grades),
            score=sum(grade.score for grade in grades) / len(grades),
            given=tuple(
                GivenAnswer(
                    row=self.rows[index].origin,
                    prompt=_end_of(self.rows[index].prompt),
                    expected=self.rows[index].expected,
                    text=answered.texts[index],
                    score=grades[index].score,
                    is_cut=answered.cut[index],
                )
                for index in spread(len(grades), SHOWN)
            ),
        )

    def _grades(self, answered: Answered) -> list[Grade]:
        if self.check is None:
            return [Grade(score=float(is_right)) for is_right in answered.matches]
        return grades_of(self.check, self.rows, answered.answers)

    def _tell(self, text: str) -> None:
        check = f"; {line_of(self.check)}" if self.check else ""
        self.emit(Notice(text=f"{text}{check}"))

    def _seconds(self) -> float:
        """Return about what all answers take, each as long as it may be, from a few tokens of the first ones."""
        own = self.trainer.group.share(self.job.questions)
        first = own[:_ROWS_AT_ONCE]
        reading, tried = (self._time(first, tokens) for tokens in (1, _TRIED))
        token = max(0.0, tried - reading) / (_TRIED - 1)
        return (reading + token * self.job.most_answer_tokens) * len(own) / len(first)

    def _time(self, questions: Sequence[HeldoutQuestion], tokens: int) -> float:
        """Return the seconds that so many tokens of each answer take."""
        decoder = self.decoder
        begin = monotonic()
        for _ in decode(
            decoder,
            [question.prompt_ids for question in questions],
            settings=self.job.sampling.model_copy(update={"max_new_tokens": tokens, "temperature": 0.0}),
            stop_ids=frozenset(),
            stop=NeverStop(),
        ):
            pass
        return monotonic() - begin

    def _training_seconds(self) -> float:
        """Return about what the steps take, from a forward pass of the first micro-batch: what comes after it is twice as much.

        Below an adapter it is as much again, as no weight there has a gradient.
        """
        trainer = self.trainer
        batch = trainer.plan.window(trainer.state.step)[0].to(trainer.device)
        body = body_of(self.parts.model)
        with torch.no_grad():
            begin = monotonic()
            hidden = body(**batch.inputs, use_cache=False).last_hidden_state
            hidden.flatten()[0].item()  # a device may still be at it
            seconds = monotonic() - begin
        steps = trainer.settings.max_steps * trainer.settings.rows_per_step
        tokens = steps * self.tokens_per_row / trainer.group.size
        return (3 if self.parts.adapter is None else 2) * tokens * seconds / max(1, batch.tokens)


def _end_of(prompt: str) -> str:
    return prompt if len(prompt) <= MOST_PROMPT else f"... {prompt[-MOST_PROMPT:]}"
