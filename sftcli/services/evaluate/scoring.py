"""Scores a model on held-out rows: loss row by row, and answers beside the expected ones."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sftcli.config.schema.run import SamplingSettings
from sftcli.data.batches.batch import Batch, ExampleSource, batches_in_order_of_length, collate, piece_of
from sftcli.data.batches.progress import Stages, with_progress
from sftcli.data.example import Example
from sftcli.errors import StoppedError
from sftcli.events import EventSink, NeverStop, Progressed, StopFlag, unheard
from sftcli.modeling.architecture import not_finite
from sftcli.modeling.decoding.decode import Row, decode
from sftcli.modeling.decoding.decoder import Decoder, choose_decoder
from sftcli.modeling.pass_memory import require_row_memory
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.runtime import monotonic
from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.evaluate.checks.grading import Answers
from sftcli.services.evaluate.general import GeneralRows
from sftcli.services.evaluate.metrics import (
    TrainingSpans,
    chrf,
    distinct_fraction,
    has_loop,
    has_reference_metrics,
    json_validity,
    paired_difference,
    rouge_l,
)
from sftcli.services.models.choose import ModelChoice, load_for_inference
from sftcli.services.processes.peers import Peers
from sftcli.services.report.score import AnsweredRow, Interval, Miss, Score
from sftcli.training.loss import ratio_standard_error
from sftcli.training.row_scores import RowScore, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORING_TOKENS = 1024  # positions scored at once; results do not depend on it
STAGES = ("scoring", "answering")  # of each model
COPIED_TOKENS = 16  # a copied span of so many tokens counts as memorized, unless the right answer holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutQuestion:
    """A held-out row cut where its last answer starts."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # the stop token included
    expected: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """What every model is scored on."""

    heldout: ExampleSource
    questions: Sequence[HeldoutQuestion]
    tokenizer: HFChatTokenizer
    sampling: SamplingSettings
    training: TrainingSpans | None  # None where it is not known what the tuned model was trained on
    batch_rows: int | None
    peers: Peers  # they share rows and questions, and all of them get the whole score
    general: GeneralRows | None = None  # where it is asked what was forgotten

    @property
    def most_answer_tokens(self) -> int:
        """Where an answer is cut: it cannot be right any more."""
        return most_answer_tokens(self.questions)


def asked_rows(job: ScoringJob) -> list[AskedRow]:
    """Return the questions of ``job`` as checks see them."""
    return [
        AskedRow(
            origin=question.origin,
            prompt=job.tokenizer.decode(question.prompt_ids, skip_special=True),
            expected=question.expected,
        )
        for question in job.questions
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A score with its rows, in order."""

    score: Score
    rows: tuple[RowScore, ...]
    matches: tuple[bool, ...]
    texts: tuple[str, ...]
    cut: tuple[bool, ...]  # answers that had not ended
    misses: tuple[Miss, ...]
    logprobs: tuple[float, ...]  # of the answers
    confidences: tuple[float, ...]  # of the answers, 0 to 1
    general: tuple[RowScore, ...] = ()

    @property
    def answers(self) -> Answers:
        """The answers, for checks."""
        return Answers(texts=self.texts, cut=self.cut)


def most_answer_tokens(questions: Sequence[HeldoutQuestion]) -> int:
    """Return a few tokens more than the longest expected answer has."""
    return max(len(question.answer_ids) for question in questions) + 8


def question_of(example: Example, tokenizer: HFChatTokenizer) -> HeldoutQuestion:
    """Cut ``example`` before its last run of trained tokens."""
    trained = np.flatnonzero(example.loss_mask)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    begin, end = int(trained[gaps[-1] + 1 if len(gaps) else 0]), int(trained[-1]) + 1
    ids = example.input_ids.tolist()
    said = takewhile(lambda token: token not in tokenizer.stop_ids, ids[begin:end])  # as generation ends
    return HeldoutQuestion(
        prompt_ids=tuple(ids[:begin]),
        answer_ids=tuple(ids[begin:end]),
        expected=tokenizer.decode(list(said), skip_special=False).strip(),
        origin=str(example.origin),
    )


def response_bytes(example: Example, tokenizer: HFChatTokenizer) -> int:
    """Return the length of the text of the trained tokens, in UTF-8."""
    text = tokenizer.decode(example.input_ids[example.loss_mask].tolist(), skip_special=True)
    return len(text.encode("utf-8"))


def score_model(
    job: ScoringJob,
    choice: ModelChoice,
    emit: EventSink,
    stop: StopFlag,
    *,
    precision: str,
    stages: Stages,
) -> Scored:
    """Score one model, in float32 unless another ``precision`` is asked for: bfloat16 sums move with the shape of a batch.

    Raises:
        StoppedError: ``stop`` was set.
    """
    begin = monotonic()
    model = load_for_inference(choice, precision=precision, emit=emit)
    require_memory(job.heldout, model, job.tokenizer)
    decoder = choose_decoder(model)
    with stages.next(choice.name) as (task, counted):
        rows = score_table(
            job.heldout, model, job.tokenizer, job.peers, task, counted, stop, batch_rows=job.batch_rows
        )
        general: tuple[RowScore, ...] = ()
        if job.general is not None:
            general = score_table(
                job.general, model, job.tokenizer, job.peers, task, unheard, stop, batch_rows=job.batch_rows
            )
    with stages.next(choice.name) as (task, counted):
        answered = answer_questions(job, decoder, task, counted, stop)
    answers, texts, matches, cut = answered.rows, answered.texts, answered.matches, answered.cut
    score = _summary(job, choice.name, rows, answers, texts, matches, seconds=monotonic() - begin)
    return Scored(
        score=score,
        rows=rows,
        matches=matches,
        texts=texts,
        cut=cut,
        misses=_misses(job, texts, cut, matches),
        logprobs=tuple(round(answer.logprob, 4) for answer in answers),
        confidences=tuple(answer.confidence for answer in answers),
        general=general,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Greedy answers to the questions of a job, in order, and which of them are exactly right."""

    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    matches: tuple[bool, ...]

    @property
    def cut(self) -> tuple[bool, ...]:
        """Which answers had not ended."""
        return tuple(row.finish == "length" for row in self.rows)

    @property
    def answers(self) -> Answers:
        """The answers, for checks."""
        return Answers(texts=self.texts, cut=self.cut)


def answer_questions(
    job: ScoringJob, decoder: Decoder, task: str, emit: EventSink, stop: StopFlag
) -> Answered:
    """Answer the questions of ``job``, and compare the answers with the expected ones.

    Raises:
        StoppedError: ``stop`` was set.
    """
    answers = _answer(job, decoder, task, emit, stop)
    texts = tuple(job.tokenizer.decode(answer.ids, skip_special=False).strip() for answer in answers)
    matches = tuple(
        answer.finish == "stop" and text == question.expected
        for answer, text, question in zip(answers, texts, job.questions, strict=True)
    )
    return Answered(rows=tuple(answers), texts=texts, matches=matches)


def score_table(
    table: ExampleSource,
    model: "PreTrainedModel",
    tokenizer: HFChatTokenizer,
    peers: Peers,
    task: str,
    emit: EventSink,
    stop: StopFlag,
    *,
    batch_rows: int | None = None,
) -> tuple[RowScore, ...]:
    """Return the score of every row of ``table``, in order, in every process; each of them scores its share.

    Raises:
        StoppedError: ``stop`` was set.
        DataError: A loss is no number.
    """
    group = peers.group
    batches = with_progress(_batches(table, tokenizer.pad_id, batch_rows), emit, task=task, total=len(table))
    batches = islice(batches, group.rank, None, group.size)
    found = score_rows(model, (batch.to(model.device) for batch in batches), stop=stop)
    if found is None:
        raise StoppedError
    if any(math.isnan(row.nll) for row in found.values()):
        raise not_finite(model)
    own = [(index, row.nll, row.tokens, row.correct) for index, row in found.items()]
    parts = cast("list[list[tuple[int, float, int, int]]]", peers.gather(own, stop))
    rows = {
        index: RowScore(nll=nll, tokens=tokens, correct=correct)
        for index, nll, tokens, correct in chain.from_iterable(parts)
    }
    return tuple(rows[index] for index in range(len(table)))


def loss_difference(first: Scored, second: Scored) -> Interval:
    """Return how much higher the loss of ``second`` is."""
    return paired_difference(
        [row.nll for row in first.rows], [row.nll for row in second.rows], [row.tokens for row in first.rows]
    )


def match_difference(first: Scored, second: Scored) -> Interval:
    """Return how many more answers of ``second`` are right, as a fraction."""
    return paired_difference(first.matches, second.matches, [1] * len(first.matches))


def samples_of(job: ScoringJob, base: Scored | None, tuned: Scored, *, most: int) -> tuple[AnsweredRow, ...]:
    """Return the first ``most`` questions with their answers."""
    return tuple(
        AnsweredRow(
            prompt=job.tokenizer.decode(question.prompt_ids, skip_special=True),
            expected=question.expected,
            base=None if base is None else base.texts[index],
            tuned=tuned.texts[index],
            base_cut=base is not None and base.cut[index],
            tuned_cut=tuned.cut[index],
        )
        for index, question in enumerate(job.questions[:most])
    )


def require_memory(table: ExampleSource, model: "PreTrainedModel", tokenizer: HFChatTokenizer) -> None:
    """Make sure that the machine has the memory for the longest row of ``table``.

    Raises:
        ResourceError: It has not; the row is named.
    """
    lengths = table.num_tokens
    row = max(range(len(table)), key=lambda index: lengths[index])
    example, longest = table[row], int(lengths[row])

    def take(tokens: int) -> None:
        piece = collate([piece_of(example, tokens)], example_ids=[0], pad_id=tokenizer.pad_id)
        score_rows(model, [piece], stop=NeverStop())

    require_row_memory(
        model,
        take,
        longest,
        row=str(example.origin),
        doing="scoring it",
        hint=lambda most: (
            f"leave it out: rows of {most:,} tokens fit; or free memory, or choose a smaller model"
        ),
    )


def _batches(table: ExampleSource, pad_id: int, batch_rows: int | None) -> Iterator[Batch]:
    count = len(table)
    if batch_rows is None:
        yield from batches_in_order_of_length(
            table, rows=range(count), max_batch_tokens=SCORING_TOKENS, pad_id=pad_id
        )
        return
    for begin in range(0, count, batch_rows):
        ids = range(begin, min(begin + batch_rows, count))
        yield collate([table[index] for index in ids], example_ids=ids, pad_id=pad_id)


def _answer(job: ScoringJob, decoder: Decoder, task: str, emit: EventSink, stop: StopFlag) -> list[Row]:
    """Answer every question greedily, those of this process here; return all answers. They may be a little longer than the longest right one."""
    by_length = sorted(range(len(job.questions)), key=lambda index: -len(job.questions[index].prompt_ids))
    order = job.peers.group.share(by_length)
    own: list[dict[str, object]] = []
    for row in decode(
        decoder,
        [job.questions[index].prompt_ids for index in order],
        settings=job.sampling.model_copy(
            update={"max_new_tokens": job.most_answer_tokens, "temperature": 0.0}
        ),
        stop_ids=job.tokenizer.stop_ids,
        stop=stop,
        max_rows=job.batch_rows,
    ):
        if row.finish and stop.requested():
            raise StoppedError
        if row.finish:
            own.append(asdict(row) | {"index": order[row.index]})
            emit(Progressed(task=task, done=len(own), total=len(order)))
    parts = cast("list[list[dict[str, Any]]]", job.peers.gather(own, stop))
    found = {row["index"]: Row(**row) for row in chain.from_iterable(parts)}
    return [found[index] for index in range(len(job.questions))]


def _misses(
    job: ScoringJob, texts: Sequence[str], cut: Sequence[bool], matches: Sequence[bool]
) -> tuple[Miss, ...]:
    return tuple(
        Miss(
            prompt=job.tokenizer.decode(question.prompt_ids, skip_special=True),
            expected=question.expected,
            answer=text,
            origin=question.origin,
            cut=is_cut,
        )
        for question, text, is_cut, is_match in zip(job.questions, texts, cut, matches, strict=True)
        if not is_match
    )


def _summary(
    job: ScoringJob,
    name: str,
    rows: Sequence[RowScore],
    answers: Sequence[Row],
    texts: Sequence[str],
    matches: Sequence[bool],
    *,
    seconds: float,
) -> Score:
    nll, tokens = math.fsum(row.nll for row in rows), sum(row.tokens for row in rows)
    expected = [question.expected for question in job.questions]
    spans = job.training
    copied = None if spans is None else [spans.longest_copied(answer.ids) for answer in answers]
    with_references = has_reference_metrics()
    sums: dict[str, list[RowScore]] = defaultdict(list)
    num_bytes = 0
    for index, row in enumerate(rows):
        example = job.heldout[index]
        sums[example.origin.path].append(row)
        num_bytes += response_bytes(example, job.tokenizer)
    valid, json_rows = json_validity(texts, expected)
    return Score(
        model=name,
        rows=len(rows),
        loss=nll / tokens,
        loss_standard_error=ratio_standard_error([row.nll for row in rows], [row.tokens for row in rows]),
        response_tokens=tokens,
        bits_per_byte=nll / math.log(2) / max(1, num_bytes),
        token_accuracy=sum(row.correct for row in rows) / tokens,
        sources={
            path: math.fsum(row.nll for row in part) / sum(row.tokens for row in part)
            for path, part in sums.items()
        },
        source_rows={path: len(part) for path, part in sums.items()},
        matched=sum(matches),
        answered=len(matches),
        rouge_l=rouge_l(texts, expected) if with_references else None,
        chrf=chrf(texts, expected) if with_references else None,
        json_fraction=valid / json_rows if json_rows else None,
        json_rows=json_rows,
        cut=sum(answer.finish == "length" for answer in answers),
        most_answer_tokens=job.most_answer_tokens,
        mean_answer_tokens=float(np.mean([len(answer.ids) for answer in answers])),
        mean_expected_tokens=float(np.mean([len(question.answer_ids) - 1 for question in job.questions])),
        distinct_2=distinct_fraction([answer.ids for answer in answers], 2),
        looping_fraction=float(np.mean([has_loop(answer.ids) for answer in answers])),
        longest_copied_tokens=None if copied is None else max(copied),
        memorized_fraction=None if copied is None else _memorized(copied, matches),
        seconds=seconds,
    )


def _memorized(copied: Sequence[int], matches: Sequence[bool]) -> float:
    """Return the share of answers that are wrong and hold a long piece of a training answer, of ``copied`` tokens."""
    return float(
        np.mean([not right and span >= COPIED_TOKENS for right, span in zip(matches, copied, strict=True)])
    )
