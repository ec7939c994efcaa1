"""Ask the base model held-out questions: alone, behind training rows drawn at random, and behind the nearest ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from sftcli.config.schema.settings import Settings
from sftcli.data.conversations.messages import Conversation
from sftcli.data.prepared.messages import KeptMessages
from sftcli.data.prepared.store import HELDOUT, TRAIN
from sftcli.data.quality.thresholds import assess_rows
from sftcli.errors import DataError
from sftcli.events import EventSink, Notice, Session
from sftcli.modeling.config_values import positions_of
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.runtime import monotonic
from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.evaluate.rows import rows_with_room, rows_with_whole_answers, spread
from sftcli.services.evaluate.scoring import (
    Answered,
    ScoringJob,
    answer_questions,
    most_answer_tokens,
    question_of,
)
from sftcli.services.evaluate.trial.pool import ExamplePool, question_turns
from sftcli.services.evaluate.trial.prompts import (
    Asked,
    ShownPrompt,
    asked_of,
    encoder_of,
    require_turns,
    with_examples,
)
from sftcli.services.evaluate.trial.remote import ask_server
from sftcli.services.models.choose import ModelChoice, load_for_inference, start_of
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.pipeline import NoMessagesError
from sftcli.services.prepare.prepare import PreparedData, prepare_rows, require_rows
from sftcli.services.processes.peers import Peers
from sftcli.services.report.score import Interval
from sftcli.services.server.address import ServerAddress
from sftcli.services.server.dialects import Server, open_server

ALONE, RANDOM, NEAREST = "alone", "random", "nearest"
SHOWN_PROMPTS = 3
MAX_PROMPT_TOKENS = 4096  # of a prompt with examples, where nobody says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """The model and rows of a training with ``settings``, and how they are tried."""

    settings: Settings
    shots: int  # 0 asks with the prompt alone
    max_rows: int
    max_prompt_tokens: int
    precision: str
    batch_size: int | None = None  # questions at once; answers in float32 do not depend on it
    server: ServerAddress | None = (
        None  # that is asked in place of the model, whose tokenizer measures rows then
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How questions were asked, and what came of it. ``texts``, ``matches`` and ``cuts`` are of the questions, in order."""

    name: str
    matched: int
    answered: int
    difference: Interval | None  # of the share answered right, against the prompt alone
    mean_shots: float
    clipped: int  # prompts with fewer examples than there are, for want of room
    mean_prompt_tokens: float
    cut: int  # answers that had not ended
    seconds: float
    texts: tuple[str, ...]
    matches: tuple[bool, ...]
    cuts: tuple[bool, ...]

    def to_json(self) -> dict[str, object]:
        """Return the numbers as plain values."""
        left = {"texts", "matches", "cuts"}
        numbers = {key: value for key, value in asdict(self).items() if key not in left}
        return numbers | {"match_fraction": self.matched / self.answered}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPrompts:
    """The same questions asked in each way, by its name; the prompt alone is the first."""

    ways: Mapping[str, Sequence[ShownPrompt]]
    room: int  # tokens that a prompt with examples may have
    repeats: int  # training rows that are no examples, because they repeat a held-out row


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport:
    """What the base answers right without training."""

    model: str
    rows: int  # held out
    train_rows: int
    repeats: int  # as in ``TrialPrompts``, and so is ``room``
    max_rows: int
    shots: int  # asked for
    room: int
    ways: tuple[Way, ...]
    samples: tuple[Mapping[str, object], ...]

    @property
    def best(self) -> Way:
        """The way with the most right answers; of those with as many, the one with the shortest prompts."""
        return max(self.ways, key=lambda way: (way.matched, -way.mean_prompt_tokens))

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        return asdict(self) | {"ways": [way.to_json() for way in self.ways], "best": self.best.name}


def run_trial(request: TrialRequest, session: Session) -> TrialReport:
    """Answer held-out rows with the model that a training would start from, without training it.

    Raises:
        DataError: No row is held out or none is left as an example, or a row is none that can be asked or shown.
        UsageError: The chat template takes no earlier turns.
        StoppedError: A stop was asked for.
    """
    server = None if request.server is None else open_server(request.server, session.emit, session.stop)
    choice = start_of(request.settings, session.emit)
    if server is not None:
        session.emit(
            Notice(
                text=f"rows are prepared and measured with the tokenizer of {choice.name}; {server.name} is asked in messages"
            )
        )
    prepared = rows_with_messages(request.settings, choice, session)
    prompts = make_prompts(request, choice, prepared, session)
    asked = ask(request, choice, prepared, prompts, session, server=server)
    ways = tuple(asked)
    return TrialReport(
        model=choice.name if server is None else server.name,
        rows=len(prepared.dataset.heldout),
        train_rows=len(prepared.dataset.train),
        repeats=prompts.repeats,
        max_rows=request.max_rows,
        shots=request.shots,
        room=prompts.room,
        ways=ways,
        samples=tuple(_samples(prepared, prompts, ways)),
    )


def make_prompts(
    request: TrialRequest, choice: ModelChoice, prepared: PreparedData, session: Session
) -> TrialPrompts:
    """Return the prompts of every way.

    Raises:
        DataError, UsageError, StoppedError: As ``run_trial``.
    """
    positions = positions_of(choice.weights_folder)
    asked = find_questions(prepared, request.settings, request.max_rows, positions, session.emit)
    if request.server is not None:
        asked = without_tools(asked, session.emit)
    alone = [
        ShownPrompt(question=one.question, messages=tuple(question_turns(one.row)), shots=0, is_clipped=False)
        for one in asked
    ]
    room = request.max_prompt_tokens
    if positions:  # so that an answer has room behind it
        room = min(room, positions - most_answer_tokens([one.question for one in asked]))
    if not request.shots:
        return TrialPrompts(ways={ALONE: alone}, room=room, repeats=0)
    require_turns(prepared.tokenizer, asked[0].row)
    pool = ExamplePool(
        KeptMessages(prepared.dataset, TRAIN),
        KeptMessages(prepared.dataset, HELDOUT),
        seed=request.settings.training.seed,
        session=session,
    )
    encoder = encoder_of(prepared.tokenizer, request.settings.data)
    ways = {ALONE: alone}
    for name, choose in ((RANDOM, pool.draw), (NEAREST, pool.nearest)):
        ways[name] = [
            with_examples(one, choose(one.row, one.number, request.shots), encoder, room=room)
            for one in asked
        ]
    prompts = TrialPrompts(ways=ways, room=room, repeats=pool.repeats)
    _tell_examples(prompts, request, session.emit)
    return prompts


def rows_with_messages(settings: Settings, choice: ModelChoice, session: Session) -> PreparedData:
    """Return rows as a training has them, kept as messages too.

    Raises:
        DataError: No row is held out, or one cannot be shown as messages, or they have no answers.
    """
    try:
        prepared = prepare_rows(
            settings, model_folder=choice.tokenizer_folder, session=session, keeps_messages=True
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
    tables = (prepared.dataset.train, prepared.dataset.heldout)
    if any(len(table) and table[0].kind == "text" for table in tables):  # rows of two kinds were refused
        raise DataError(
            "the rows are pretraining text, which has no answers to compare with",
            hint="name rows with prompts and answers",
        )
    if not len(prepared.dataset.heldout):
        raise DataError(
            "there are no held-out rows to ask",
            hint="hold some out with --set data.heldout_fraction=0.2, or name some with --heldout FILE",
        )
    return prepared


def find_questions(
    prepared: PreparedData, settings: Settings, max_rows: int, positions: int, emit: EventSink
) -> list[Asked]:
    """Return the questions, of the rows that ``sft eval`` answers.

    Raises:
        DataError: There is none.
    """
    heldout, kept = prepared.dataset.heldout, KeptMessages(prepared.dataset, HELDOUT)
    whole = rows_with_whole_answers(heldout, named="DATA")
    whole = rows_with_room(heldout, whole, positions, emit)
    numbers = [whole[place] for place in spread(len(whole), max_rows)]
    tokenizer = prepared.tokenizer
    encoder = encoder_of(tokenizer, settings.data)
    found = [
        asked_of(number, kept[number], question_of(heldout[number], tokenizer), encoder, tokenizer)
        for number in numbers
    ]
    asked = [one for one in found if one is not None]
    why = "they are cut, or what has loss does not begin where the model would begin to answer"
    if not asked:
        raise DataError(
            f"none of {len(found)} held-out rows can be asked: {why}",
            hint="leave out --overlong truncate and --thinking keep, and parts of answers without loss (weight 0)",
        )
    if left := len(found) - len(asked):
        emit(Notice(text=f"{left} of {len(found)} held-out rows are not asked: {why}"))
    return asked


def without_tools(asked: Sequence[Asked], emit: EventSink) -> list[Asked]:
    """Return the questions that a server can be asked in messages alone.

    Raises:
        DataError: There is none.
    """
    found = [one for one in asked if _is_plain(one.row)]
    if not found:
        raise DataError(
            "every held-out row has tools, thinking in earlier turns, or variables for its template, and a server is not asked such"
        )
    if left := len(asked) - len(found):
        why = "tools, thinking in earlier turns, or variables for their template"
        emit(Notice(text=f"{left} of {len(asked)} held-out rows have {why}, and are not asked"))
    return found


def _is_plain(row: Conversation) -> bool:
    """Return whether a prompt is nothing but roles and texts."""
    turns = question_turns(row)
    is_more = any(turn.tool_calls or turn.thinking or turn.role == "tool" for turn in turns)
    return not (row.tools or row.variables or is_more)


def _tell_examples(prompts: TrialPrompts, request: TrialRequest, emit: EventSink) -> None:
    """Tell which prompts have fewer examples than asked for, and why.

    Raises:
        DataError: None has any.
    """
    shown = [one for name, made in prompts.ways.items() if name != ALONE for one in made]
    if not any(one.shots for one in shown):
        raise DataError(
            f"no prompt can have an example: {_why_short(shown, prompts)}",
            hint="ask with the prompt alone: --shots 0; or allow longer prompts with --max-prompt-tokens",
        )
    if prompts.repeats:
        emit(Notice(text=f"{prompts.repeats:,} training rows are no examples: they repeat a held-out row"))
    if short := [one for one in shown if one.shots < request.shots]:
        why = _why_short(short, prompts)
        emit(
            Notice(
                text=f"{len(short)} of {len(shown)} prompts have fewer than {request.shots} examples: {why}"
            )
        )


def _why_short(short: Sequence[ShownPrompt], prompts: TrialPrompts) -> str:
    clipped = sum(one.is_clipped for one in short)
    without = f", without the {prompts.repeats:,} that repeat a held-out row" if prompts.repeats else ""
    reasons = (
        (clipped, f"more than {prompts.room:,} tokens are not allowed ({clipped})"),
        (len(short) - clipped, f"no more training rows have their system text and tools{without}"),
    )
    return "; ".join(text for count, text in reasons if count)


def ask(
    request: TrialRequest,
    choice: ModelChoice,
    prepared: PreparedData,
    prompts: TrialPrompts,
    session: Session,
    *,
    server: Server | None = None,
) -> Iterator[Way]:
    """Load the model of ``choice``, or take ``server`` in its place, and yield what came of each way of asking it.

    Raises:
        StoppedError: A stop was asked for.
    """
    decoder = None
    if server is None:
        decoder = choose_decoder(load_for_inference(choice, precision=request.precision, emit=session.emit))
    alone: Answered | None = None
    for number, (name, made) in enumerate(prompts.ways.items(), 1):
        begin = monotonic()
        job = ScoringJob(
            heldout=prepared.dataset.heldout,
            questions=[one.question for one in made],
            tokenizer=prepared.tokenizer,
            sampling=request.settings.sampling,
            training=None,
            batch_rows=request.batch_size,
            peers=Peers(),
        )
        who = choice.name if server is None else server.name
        task = f"{number} of {len(prompts.ways)}: asking, {name} ({who})"
        if server is not None:
            greedy = job.sampling.model_copy(
                update={"max_new_tokens": job.most_answer_tokens, "temperature": 0.0}
            )
            answered = ask_server(server, made, greedy, task, session)
        else:
            assert decoder is not None
            answered = answer_questions(job, decoder, task, session.emit, session.stop)
        yield _way(name, made, answered, against=alone, seconds=monotonic() - begin)
        alone = alone or answered


def _samples(
    prepared: PreparedData, prompts: TrialPrompts, ways: Sequence[Way]
) -> Iterator[Mapping[str, object]]:
    """Yield every question with its answers, the first ones with the text of their prompts too."""
    decode = prepared.tokenizer.decode
    for index, one in enumerate(prompts.ways[ALONE]):
        sample: dict[str, object] = {
            "origin": one.question.origin,
            "expected": one.question.expected,
            "answers": {way.name: way.texts[index] for way in ways},
        }
        if index < SHOWN_PROMPTS:
            sample["prompts"] = {
                name: decode(made[index].question.prompt_ids, skip_special=False)
                for name, made in prompts.ways.items()
            }
        yield sample


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
        clipped=sum(one.is_clipped for one in prompts),
        mean_prompt_tokens=fmean(len(one.question.prompt_ids) for one in prompts),
        cut=sum(answered.cut),
        seconds=seconds,
        texts=answered.texts,
        matches=matches,
        cuts=answered.cut,
    )
