"""Score a model on held-out rows, beside the model it came from."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftcli.config.schema import SamplingSettings
from sftcli.config.sources import Override, Settings, resolve
from sftcli.data.batch import ExampleSource, batches_in_order_of_length, collate
from sftcli.data.example import Example
from sftcli.errors import DataError, StoppedError, UsageError
from sftcli.events import EventSink, Progressed, StopFlag
from sftcli.modeling.locate import locate_model
from sftcli.modeling.sampling import decode
from sftcli.modeling.tokenizer import HFChatTokenizer
from sftcli.runtime import monotonic
from sftcli.services.models import ModelChoice, choose_model, load_for_inference
from sftcli.services.prepare import prepare_data
from sftcli.training.loss import heldout_nll
from sftcli.training.probe import choose_batch_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORING_TOKENS = 4096  # positions scored at once; results do not depend on it
GENERATION_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """Which model on which rows.

    ``checkpoint`` as in ``choose_model``. ``data`` names the rows; without it they are the held-out rows of the run that
    made the model. The score is set beside that of ``base``, by default the model that the run started from. At most
    ``max_rows`` rows, spread evenly, are answered by generation; all of them are scored for loss.
    """

    checkpoint: str | None
    data: tuple[str, ...]
    base: str | None
    with_base: bool
    max_rows: int
    root: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one model did. ``loss`` is nats per response token; ``matched`` of ``answered`` rows were exactly right."""

    model: str
    loss: float
    response_tokens: int
    matched: int
    answered: int
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Return the score with what follows from it."""
        return asdict(self) | {"perplexity": self.perplexity, "match_fraction": self.match_fraction}

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)

    @property
    def match_fraction(self) -> float:
        """Share of answered rows that are exactly right."""
        return self.matched / self.answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A held-out row that the tuned model got wrong."""

    prompt: str
    expected: str
    answer: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Scores of the tuned model and, where one was named, of the base."""

    rows: int
    tuned: Score
    base: Score | None
    misses: tuple[Miss, ...]

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        return {
            "rows": self.rows,
            "tuned": self.tuned.to_json(),
            "base": None if self.base is None else self.base.to_json(),
            "misses": [asdict(miss) for miss in self.misses],
        }


def run_evaluation(request: EvalRequest, emit: EventSink, stop: StopFlag) -> EvalReport:
    """Score the model, and the base if one is named, on the same held-out rows.

    Raises:
        DataError: No row is held out.
    """
    choice = choose_model(request.checkpoint, root=request.root, emit=emit)
    settings = _settings_of(choice, request.data)
    prepared = prepare_data(
        settings.data, model_folder=choice.folder, seed=settings.training.seed, emit=emit, stop=stop
    )
    heldout = prepared.dataset.heldout
    if not len(heldout):
        raise DataError("no row is held out, so there is nothing to score", hint="name rows with --data FILE")
    job = _Job(
        heldout=heldout,
        questions=[_question(heldout[row]) for row in _spread(len(heldout), request.max_rows)],
        tokenizer=prepared.tokenizer,
        precision=settings.training.precision,
        sampling=settings.sampling,
    )
    base = _base_of(choice, settings, request, emit)
    base_score = None if base is None else _score(job, base, emit, stop)[0]
    tuned_score, misses = _score(job, choice, emit, stop)
    return EvalReport(rows=len(heldout), tuned=tuned_score, base=base_score, misses=misses)


def _settings_of(choice: ModelChoice, data: tuple[str, ...]) -> Settings:
    """Return the settings of the run that made the model, with ``data`` as the rows to score where it is given."""
    config = None if choice.run is None else choice.run.config
    overrides = []
    if data:
        overrides.append(Override(key="data.sources", value=[], origin="--data"))
        overrides.append(Override(key="data.heldout_sources", value=list(data), origin="--data"))
    elif choice.run is None:
        raise UsageError(
            f"{choice.name} was not made by a run that holds rows out", hint="name rows with --data FILE"
        )
    return resolve(preset=None, config_file=config, overrides=overrides, environ={}).settings


def _base_of(
    choice: ModelChoice, settings: Settings, request: EvalRequest, emit: EventSink
) -> ModelChoice | None:
    if not request.with_base:
        return None
    if request.base is not None:
        return choose_model(request.base, root=request.root, emit=emit)
    if choice.run is None:
        return None
    located = locate_model(settings.model.name, revision=settings.model.revision, emit=emit)
    return ModelChoice(name=located.name, folder=located.folder, run=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A held-out row cut where its last answer starts."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # the stop token included
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What every model is scored on."""

    heldout: ExampleSource
    questions: Sequence[_Question]
    tokenizer: HFChatTokenizer
    precision: str
    sampling: SamplingSettings


def _spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` row numbers, evenly spread."""
    return [round(row) for row in np.linspace(0, count - 1, num=min(most, count))]


def _question(example: Example) -> _Question:
    """Cut ``example`` before its last run of trained tokens."""
    trained = np.flatnonzero(example.loss_mask)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    begin, end = int(trained[gaps[-1] + 1 if len(gaps) else 0]), int(trained[-1]) + 1
    ids = example.input_ids.tolist()
    return _Question(
        prompt_ids=tuple(ids[:begin]), answer_ids=tuple(ids[begin:end]), origin=str(example.origin)
    )


def _score(job: _Job, choice: ModelChoice, emit: EventSink, stop: StopFlag) -> tuple[Score, tuple[Miss, ...]]:
    begin = monotonic()
    model = load_for_inference(choice, precision=job.precision, emit=emit)
    pad_id = job.tokenizer.pad_id
    first = collate([job.heldout[0]], example_ids=[0], pad_id=pad_id).to(model.device)
    batch_loss = choose_batch_loss(model, first, emit=emit)
    batches = batches_in_order_of_length(
        job.heldout, rows=range(len(job.heldout)), max_batch_tokens=SCORING_TOKENS, pad_id=pad_id
    )
    nll = heldout_nll(batch_loss, (batch.to(model.device) for batch in batches), stop=stop)
    if nll is None:
        raise StoppedError
    misses, answered = _answer(job, model, choice.name, emit, stop)
    score = Score(
        model=choice.name,
        loss=nll.loss,
        response_tokens=nll.response_tokens,
        matched=answered - len(misses),
        answered=answered,
        seconds=monotonic() - begin,
    )
    return score, misses


def _answer(
    job: _Job, model: "PreTrainedModel", name: str, emit: EventSink, stop: StopFlag
) -> tuple[tuple[Miss, ...], int]:
    """Answer every question greedily; return the wrong ones and how many were asked."""
    order = sorted(range(len(job.questions)), key=lambda index: len(job.questions[index].prompt_ids))
    misses: dict[int, Miss] = {}
    for done in range(0, len(order), GENERATION_ROWS):
        part = order[done : done + GENERATION_ROWS]
        asked = [job.questions[index] for index in part]
        longest = max(len(question.answer_ids) for question in asked)
        answers = decode(
            model,
            [question.prompt_ids for question in asked],
            # An answer that is longer than the longest right one is wrong already.
            settings=job.sampling.model_copy(update={"max_new_tokens": longest, "temperature": 0.0}),
            stop_ids=job.tokenizer.stop_ids,
            stop=stop,
        )
        if stop.requested():
            raise StoppedError
        for index, question, answer in zip(part, asked, answers, strict=True):
            expected = job.tokenizer.decode(question.answer_ids, skip_special=True).strip()
            text = job.tokenizer.decode(answer.ids, skip_special=False).strip()
            if not answer.stopped or text != expected:
                prompt = job.tokenizer.decode(question.prompt_ids, skip_special=True)
                misses[index] = Miss(prompt=prompt, expected=expected, answer=text, origin=question.origin)
        emit(Progressed(task=f"answering ({name})", done=done + len(part), total=len(order)))
    return tuple(misses[index] for index in sorted(misses)), len(order)
