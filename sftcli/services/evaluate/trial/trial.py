"""Ask the base model held-out questions: alone, behind training rows drawn at random, and behind the nearest ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from sftcli.config.schema.settings import Settings
from sftcli.data.prepared.messages import KeptMessages
from sftcli.data.prepared.store import HELDOUT, TRAIN
from sftcli.data.quality.thresholds import assess_rows
from sftcli.errors import DataError
from sftcli.events import EventSink, Notice, Session
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.runtime import monotonic
from sftcli.services.evaluate.metrics import Interval, paired_difference
from sftcli.services.evaluate.rows import rows_with_whole_answers, spread
from sftcli.services.evaluate.scoring import Answered, ScoringJob, answer_questions, question_of
from sftcli.services.evaluate.trial.pool import ExamplePool
from sftcli.services.evaluate.trial.prompts import (
    Asked,
    ShownPrompt,
    encoder_of,
    is_whole_prompt,
    require_turns,
    with_examples,
)
from sftcli.services.models.choose import ModelChoice, load_for_inference, start_of
from sftcli.services.prepare.capacity import positions_of, require_room
from sftcli.services.prepare.pipeline import NoMessagesError
from sftcli.services.prepare.prepare import PreparedData, prepare_data, require_rows
from sftcli.services.prepare.sources import find_sources
from sftcli.services.processes.peers import Peers

if TYPE_CHECKING:
    from sftcli.data.conversations.messages import Conversation

ALONE, RANDOM, NEAREST = "alone", "random", "nearest"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """The model and rows of a training with ``settings``, and how they are tried."""

    settings: Settings
    shots: int  # 0 asks with the prompt alone
    max_rows: int
    max_prompt_tokens: int
    precision: str
    batch_size: int | None = None  # questions at once; answers in float32 do not depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How questions were asked, and what came of it. ``texts`` and ``matches`` are of the questions, in order."""

    name: str
    matched: int
    answered: int
    difference: Interval | None  # of the share answered right, against the prompt alone
    mean_shots: float
    mean_prompt_tokens: float
    cut: int  # answers that had not ended
    seconds: float
    texts: tuple[str, ...]
    matches: tuple[bool, ...]

    def to_json(self) -> dict[str, object]:
        """Return the numbers as plain values."""
        left = {"texts", "matches"}
        numbers = {key: value for key, value in asdict(self).items() if key not in left}
        return numbers | {"match_fraction": self.matched / self.answered}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport:
    """What the base answers right without training."""

    model: str
    rows: int  # held out
    train_rows: int
    repeats: int  # training rows that are no examples, because they repeat a held-out row
    max_rows: int
    shots: int  # asked for
    room: int  # tokens that a prompt with examples may have
    clipped: Mapping[str, int]  # prompts of each way with fewer examples than asked for, for want of room
    ways: tuple[Way, ...]
    questions: tuple[Asked, ...]

    @property
    def best(self) -> Way:
        """The way with the most right answers; of those with as many, the one with the shortest prompts."""
        return max(self.ways, key=lambda way: (way.matched, -way.mean_prompt_tokens))

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        numbers = {
            key: getattr(self, key)
            for key in ("model", "rows", "train_rows", "repeats", "max_rows", "shots", "room", "clipped")
        }
        samples = [
            {
                "origin": asked.question.origin,
                "expected": asked.question.expected,
                "answers": {way.name: way.texts[index] for way in self.ways},
            }
            for index, asked in enumerate(self.questions)
        ]
        ways = [way.to_json() for way in self.ways]
        return numbers | {"ways": ways, "best": self.best.name, "samples": samples}


def run_trial(request: TrialRequest, session: Session) -> TrialReport:
    """Answer held-out rows with the model that a training would start from, without training it.

    Raises:
        DataError: No row is held out or none is left as an example, or a row is none that can be asked or shown.
        UsageError: The chat template takes no earlier turns.
        StoppedError: A stop was asked for.
    """
    settings = request.settings
    choice = start_of(settings, session.emit)
    prepared = _prepare(settings, choice, session)
    asked = _questions(prepared, request, session.emit)
    job = ScoringJob(
        heldout=prepared.dataset.heldout,
        questions=[one.question for one in asked],
        tokenizer=prepared.tokenizer,
        sampling=settings.sampling,
        training=None,
        batch_rows=request.batch_size,
        peers=Peers(),
    )
    room = _room(request, choice, job.most_answer_tokens)
    prompts, repeats = {ALONE: [_alone(one) for one in asked]}, 0
    if request.shots:
        require_turns(prepared.tokenizer, asked[0].row)
        pool = ExamplePool(
            KeptMessages(prepared.dataset, TRAIN),
            KeptMessages(prepared.dataset, HELDOUT),
            seed=settings.training.seed,
            session=session,
        )
        repeats = pool.repeats
        prompts |= _prompts_with_examples(asked, pool, prepared, request, room)
        _tell_examples(prompts, request, room, repeats, session.emit)
    return TrialReport(
        model=choice.name,
        rows=len(prepared.dataset.heldout),
        train_rows=len(prepared.dataset.train),
        repeats=repeats,
        max_rows=request.max_rows,
        shots=request.shots,
        room=room,
        clipped={name: sum(one.is_clipped for one in made) for name, made in prompts.items()},
        ways=tuple(_ask(job, choice, prompts, request, session)),
        questions=tuple(asked),
    )


def _prepare(settings: Settings, choice: ModelChoice, session: Session) -> PreparedData:
    try:
        prepared = prepare_data(
            settings.data,
            find_sources(settings.data),
            model_folder=choice.tokenizer_folder,
            seed=settings.training.seed,
            session=session,
            keeps_messages=True,
        )
    except NoMessagesError as error:
        raise DataError(
            error.message,
            hint="what stands in a prompt are turns, which token ids, running text and such rows are not: leave them out",
            location=error.location,
        ) from error
    require_rows(prepared)
    require_room(prepared, choice.weights_folder, session.emit)
    assess_rows(list(prepared.audit.values()), settings.data).require()
    if not len(prepared.dataset.heldout):
        raise DataError(
            "there are no held-out rows to ask",
            hint="hold some out with --set data.heldout_fraction=0.2, or name some with --heldout FILE",
        )
    return prepared


def _questions(prepared: PreparedData, request: TrialRequest, emit: EventSink) -> list[Asked]:
    """Return the questions, of the rows that ``sft eval`` answers.

    Raises:
        DataError: There is none.
    """
    heldout, kept = prepared.dataset.heldout, KeptMessages(prepared.dataset, HELDOUT)
    whole = rows_with_whole_answers(heldout, named="DATA")
    numbers = [whole[place] for place in spread(len(whole), request.max_rows)]
    encoder = encoder_of(prepared.tokenizer, request.settings.data)
    found = [
        Asked(number=number, row=kept[number], question=question_of(heldout[number], prepared.tokenizer))
        for number in numbers
    ]
    asked = [one for one in found if is_whole_prompt(one, encoder)]
    why = "what stands before their answer is not the whole of their earlier turns and nothing else"
    if not asked:
        raise DataError(
            f"none of {len(found)} held-out rows can be asked: {why}",
            hint="rows that are cut (--overlong truncate), keep thinking without loss (--thinking keep) or parts of an answer "
            "(weight 0) cannot",
        )
    if left := len(found) - len(asked):
        emit(Notice(text=f"{left} of {len(found)} held-out rows are not asked: {why}"))
    return asked


def _room(request: TrialRequest, choice: ModelChoice, answer_tokens: int) -> int:
    """Return how many tokens a prompt with examples may have, so that an answer has room behind it."""
    positions = positions_of(choice.weights_folder)
    return min(
        request.max_prompt_tokens, positions - answer_tokens if positions else request.max_prompt_tokens
    )


def _alone(asked: Asked) -> ShownPrompt:
    return ShownPrompt(question=asked.question, shots=0, is_clipped=False)


def _prompts_with_examples(
    asked: Sequence[Asked], pool: ExamplePool, prepared: PreparedData, request: TrialRequest, room: int
) -> dict[str, list[ShownPrompt]]:
    encoder = encoder_of(prepared.tokenizer, request.settings.data)
    choices: Mapping[str, Callable[[Conversation, int, int], list[Conversation]]]
    choices = {RANDOM: pool.draw, NEAREST: pool.nearest}
    return {
        name: [
            with_examples(one, choose(one.row, one.number, request.shots), encoder, room=room)
            for one in asked
        ]
        for name, choose in choices.items()
    }


def _tell_examples(
    prompts: Mapping[str, Sequence[ShownPrompt]],
    request: TrialRequest,
    room: int,
    repeats: int,
    emit: EventSink,
) -> None:
    """Tell which prompts have fewer examples than asked for, and why.

    Raises:
        DataError: None has any.
    """
    shown = [one for name, made in prompts.items() if name != ALONE for one in made]
    if not any(one.shots for one in shown):
        raise DataError(
            f"no prompt can have an example: {_why_short(shown, room)}",
            hint="ask with the prompt alone: --shots 0; or allow longer prompts with --max-prompt-tokens",
        )
    if repeats:
        emit(Notice(text=f"{repeats} training rows are no examples, because they repeat a held-out row"))
    if short := [one for one in shown if one.shots < request.shots]:
        emit(
            Notice(
                text=f"{len(short)} of {len(shown)} prompts have fewer than {request.shots} examples: {_why_short(short, room)}"
            )
        )


def _why_short(short: Sequence[ShownPrompt], room: int) -> str:
    clipped = sum(one.is_clipped for one in short)
    reasons = (
        (clipped, f"more than {room:,} tokens are not allowed ({clipped})"),
        (len(short) - clipped, "no more training rows have their system text and tools"),
    )
    return "; ".join(text for count, text in reasons if count)


def _ask(
    job: ScoringJob,
    choice: ModelChoice,
    prompts: Mapping[str, Sequence[ShownPrompt]],
    request: TrialRequest,
    session: Session,
) -> Iterator[Way]:
    decoder = choose_decoder(load_for_inference(choice, precision=request.precision, emit=session.emit))
    alone: Answered | None = None
    for number, (name, made) in enumerate(prompts.items(), 1):
        begin = monotonic()
        asking = replace(job, questions=[one.question for one in made])
        task = f"{number} of {len(prompts)}: asking, {name} ({choice.name})"
        answered = answer_questions(asking, decoder, task, session.emit, session.stop)
        yield _way(name, made, answered, against=alone, seconds=monotonic() - begin)
        alone = alone or answered


def _way(
    name: str,
    prompts: Sequence[ShownPrompt],
    answered: Answered,
    *,
    against: Answered | None,
    seconds: float,
) -> Way:
    matches = answered.matches
    return Way(
        name=name,
        matched=sum(matches),
        answered=len(matches),
        difference=None
        if against is None
        else paired_difference(against.matches, matches, [1] * len(matches)),
        mean_shots=fmean(one.shots for one in prompts),
        mean_prompt_tokens=fmean(len(one.question.prompt_ids) for one in prompts),
        cut=sum(answered.cut),
        seconds=seconds,
        texts=answered.texts,
        matches=matches,
    )
