"""The ledger of a run: its rows scored by the model that it began with and by the one that it made."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sftcli.config.schema.settings import Settings
from sftcli.data.batches.batch import ExampleSource
from sftcli.data.batches.progress import Stages
from sftcli.data.conversations.fixes import read_fixes
from sftcli.data.conversations.fixes_done import Fix
from sftcli.data.example import CUT_ANSWERS, PARTS, Example
from sftcli.data.prepared.store import HELDOUT, TRAIN, ExampleTable, PreparedDataset
from sftcli.errors import DataError, UsageError
from sftcli.events import EventSink, Notice, Session, unheard
from sftcli.figures import counted, duration
from sftcli.modeling.formats.identity import answering_hash
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.runtime import monotonic
from sftcli.services.evaluate.ledger.exchange import ExchangedRows
from sftcli.services.evaluate.ledger.reasons import Costs, Numbers, listed_by_cost, order_of_doubt
from sftcli.services.evaluate.ledger.repeats import contradictions
from sftcli.services.evaluate.ledger.traits import odd_traits
from sftcli.services.evaluate.request import KEPT_PRECISION
from sftcli.services.evaluate.rows import spread
from sftcli.services.evaluate.scoring import question_of, require_memory, score_table
from sftcli.services.models.choose import ModelChoice, base_of, choose_model, load_for_inference
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.prepare import PreparedData, prepare_rows
from sftcli.services.processes.peers import Peers, joined
from sftcli.services.processes.rank import find_place
from sftcli.services.report.ledger import MOST_SHOWN, Ledger, Reason, RowLosses, SourceLosses, write_ledger
from sftcli.services.report.samples import split_prompts
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.lock import EvaluationLock
from sftcli.services.runs.summary import RunHistory
from sftcli.services.runs.trained_rows import are_rows_of
from sftcli.training.row_scores import RowScore

MOST_ROWS = 10_000  # scored where the user says nothing else
MOST_CHARS = 800  # of a text that is kept
STAGES = ("scoring", "scoring behind other prompts")  # of each model
_OF_A_STEP = 3  # a step takes about as long as so many passes that only score


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRequest:
    """Which run, and how many of its rows at most; more are drawn evenly."""

    run: str | None
    root: Path
    most_rows: int = MOST_ROWS
    trusts_code: bool = False
    base_model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    choice: ModelChoice
    run: RunFolder
    prepared: PreparedData
    base: ModelChoice | None
    fixes: tuple[Fix, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    split: str
    table: ExampleTable
    row: int


class _Chosen:
    """Rows of both splits, one after the other, each once."""

    def __init__(self, places: Sequence[_Place]) -> None:
        self.places = places
        self.num_tokens = [one.table.num_tokens[one.row] for one in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Example:
        place = self.places[index]
        return place.table[place.row]


def run_ledger(request: LedgerRequest, session: Session) -> Ledger:
    """Score the rows of a run, and keep the ledger with it.

    Raises:
        UsageError: The model is of no run.
        DataError: There are no rows.
        OutputError: Another process scores the run.
        StoppedError: It was stopped.
    """
    with joined(find_place(os.environ), session.emit) as peers, ExitStack() as held:

        def find() -> _Found:
            choice = choose_model(
                request.run,
                root=request.root,
                emit=session.emit,
                trusts_code=request.trusts_code,
                base_model=request.base_model,
            )
            if choice.run is None:
                raise UsageError(f"{choice.name} is no run, so its rows are not known", hint="name a run")
            if peers.group.is_writer:
                held.enter_context(EvaluationLock(choice.run, session.emit))
            settings = read_settings(choice.run)
            prepared = prepare_rows(settings, model_folder=choice.tokenizer_folder, session=session)
            base = base_of(choice, session.emit, trusts_code=request.trusts_code, named=request.base_model)
            for one in (choice, base):
                if one is not None:
                    require_room(prepared, one.weights_folder, session.emit if one is choice else unheard)
            fixes = _fixes_of(settings)
            return _Found(choice=choice, run=choice.run, prepared=prepared, base=base, fixes=fixes)

        found = peers.rank_zero_first(find, session.stop)
        ledger = _scored(found, request.most_rows, session, peers)
        if peers.group.is_writer:
            write_ledger(found.run, ledger)
        return ledger


def _fixes_of(settings: Settings) -> tuple[Fix, ...]:
    """Return the fixes that the rows are prepared with."""
    return () if settings.data.fixes is None else tuple(read_fixes(settings.data.fixes).by_row.values())


def _scored(found: _Found, most_rows: int, session: Session, peers: Peers) -> Ledger:
    run, prepared, choice, base = found.run, found.prepared, found.choice, found.base
    are_rows_of(run, prepared.dataset, session.emit)
    everything = list(_each_once(prepared.dataset))
    if not everything:
        raise DataError(f"{run.name} has no rows", hint="sft prepare tells why")
    chosen = _Chosen([everything[place] for place in spread(len(everything), most_rows)])
    models = [choice] if base is None else [base, choice]
    _tell_cost(chosen, len(everything), len(models), RunHistory(read_events(run)), session.emit)
    begin, stages = monotonic(), Stages(STAGES * len(models), session.emit)
    scores = [_score(one, chosen, prepared.tokenizer, stages, session, peers) for one in models]
    kept = frozenset(fix.row for fix in found.fixes if fix.fix == "keep")
    return Ledger(
        model=run.inside(choice.folder),
        model_hash=answering_hash(choice.folder),
        base=None if base is None else base.name,
        available=len(everything),
        seconds=monotonic() - begin,
        sources=tuple(_by_source(chosen, scores)),
        rows=tuple(_rows(chosen, _costs(chosen, scores), prepared.tokenizer, kept)),
        fixes=found.fixes,
    )


def _each_once(dataset: PreparedDataset) -> Iterator[_Place]:
    """Yield the rows of both splits; one that an epoch has several times is scored once."""
    for split, table in ((TRAIN, dataset.train), (HELDOUT, dataset.heldout)):
        seen = set[tuple[tuple[str, int], bytes]]()
        for row, (origin, (digest, _)) in enumerate(zip(table.origins(), table.keys(), strict=True)):
            if (origin, digest) not in seen:
                seen.add((origin, digest))
                yield _Place(split, table, row)


def _tell_cost(chosen: _Chosen, available: int, models: int, history: RunHistory, emit: EventSink) -> None:
    """Tell what is done and how long it takes, by the speed of the training, where that is known."""
    passes, tokens = len(STAGES) * models, sum(chosen.num_tokens)
    drawn = "" if len(chosen) == available else f" of {available:,}, evenly drawn (--max-rows)"
    text = (
        f"scoring {counted(len(chosen), 'row')}{drawn} in {passes} passes, {passes * tokens:,} tokens in all"
    )
    if history.tokens_per_second:
        seconds = passes * tokens / (_OF_A_STEP * history.tokens_per_second)
        text += f": about {passes / _OF_A_STEP:.1f} times as long as to train on these rows once, {duration(seconds)}"
    emit(Notice(text=text))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """Of one model: the rows as they are, and behind the prompts of others."""

    own: tuple[RowScore, ...]
    apart: tuple[RowScore, ...]


def _score(
    choice: ModelChoice,
    chosen: _Chosen,
    tokenizer: HFChatTokenizer,
    stages: Stages,
    session: Session,
    peers: Peers,
) -> _Scores:
    model = load_for_inference(choice, precision=KEPT_PRECISION, emit=session.emit)
    require_memory(chosen, model, tokenizer)

    def score(table: ExampleSource) -> tuple[RowScore, ...]:
        with stages.next(choice.name) as (task, emit):
            return score_table(table, model, tokenizer, peers, task, emit, session.stop)

    return _Scores(own=score(chosen), apart=score(ExchangedRows(chosen)))


def _costs(chosen: _Chosen, scores: Sequence[_Scores]) -> Costs:
    def per_token(rows: Sequence[RowScore]) -> Numbers:
        return np.array([row.nll / row.tokens for row in rows])

    before, after = scores[0] if len(scores) > 1 else None, scores[-1]
    return Costs(
        tokens=np.array([row.tokens for row in after.own], dtype=np.float64),
        is_heldout=np.array([place.split == HELDOUT for place in chosen.places]),
        after=per_token(after.own),
        after_apart=per_token(after.apart),
        before=None if before is None else per_token(before.own),
        before_apart=None if before is None else per_token(before.apart),
    )


def _by_source(chosen: _Chosen, scores: Sequence[_Scores]) -> Iterator[SourceLosses]:
    groups: Mapping[tuple[str, str], list[int]] = defaultdict(list)
    for index, place in enumerate(chosen.places):
        groups[place.split, chosen[index].origin.path].append(index)
    for (split, source), rows in groups.items():
        losses = [_loss(one.own, rows) for one in scores]
        yield SourceLosses(
            split=split,
            source=source,
            rows=len(rows),
            tokens=sum(scores[-1].own[row].tokens for row in rows),
            before=losses[0] if len(losses) > 1 else None,
            after=losses[-1],
        )


def _loss(scores: Sequence[RowScore], rows: Sequence[int]) -> float:
    return math.fsum(scores[row].nll for row in rows) / sum(scores[row].tokens for row in rows)


def _rows(chosen: _Chosen, costs: Costs, tokenizer: HFChatTokenizer, kept: frozenset[str]) -> list[RowLosses]:
    """Return the rows in the order of doubt, each with its reasons; the first of each reason with their texts.

    A row of ``kept`` has none: it was looked at.
    """
    examples = [chosen[row] for row in range(len(chosen))]
    prompts, answers = _texts(examples, tokenizer)
    reasons = [
        {} if example.row in kept else found
        for example, found in zip(examples, _reasons(examples, prompts, answers, costs), strict=True)
    ]
    order = order_of_doubt(costs)
    shown = _shown(order, reasons)
    return [
        RowLosses(
            split=chosen.places[row].split,
            source=examples[row].origin.path,
            line=examples[row].origin.line,
            row=examples[row].row,
            tokens=int(costs.tokens[row]),
            before=None if costs.before is None else float(costs.before[row]),
            after=float(costs.after[row]),
            apart_before=None if costs.before_apart is None else float(costs.before_apart[row]),
            apart_after=float(costs.after_apart[row]),
            reasons={reason.value: words for reason, words in reasons[row].items()},
            prompt=cut(prompts[row]) if row in shown else "",
            answer=cut(answers[row]) if row in shown else "",
            is_cut=row in shown
            and (cut(answers[row]) != answers[row] or bool(examples[row].flags & CUT_ANSWERS)),
            is_kept=examples[row].row in kept,
            is_part=bool(examples[row].flags & PARTS),
        )
        for row in order
    ]


def _texts(examples: Sequence[Example], tokenizer: HFChatTokenizer) -> tuple[list[str], list[str]]:
    """Return what stands before the last answer of each row, without what all of them share, and that answer."""
    prompts, answers = [], []
    for example in examples:
        question = question_of(example, tokenizer)
        is_text = example.kind == "text"
        prompts.append("" if is_text else tokenizer.decode(question.prompt_ids, skip_special=True))
        answers.append(
            tokenizer.decode(example.input_ids.tolist(), skip_special=True) if is_text else question.expected
        )
    return list(split_prompts(prompts).own), answers


def _reasons(
    examples: Sequence[Example], prompts: Sequence[str], answers: Sequence[str], costs: Costs
) -> list[dict[Reason, str]]:
    origins = [example.origin for example in examples]
    asked = [row for row, prompt in enumerate(prompts) if prompt]
    other = contradictions(
        [prompts[row] for row in asked], [answers[row] for row in asked], [origins[row] for row in asked]
    )
    found = [
        by_cost | by_text
        for by_cost, by_text in zip(
            listed_by_cost(costs), odd_traits([one.path for one in origins], answers), strict=True
        )
    ]
    for place, words in other.items():
        found[asked[place]][Reason.CONTRADICTION] = words
    return found


def _shown(order: Sequence[int], reasons: Sequence[Mapping[Reason, str]]) -> frozenset[int]:
    shown = set[int]()
    for reason in Reason:
        shown.update([row for row in order if reason in reasons[row]][:MOST_SHOWN])
    return frozenset(shown)


def cut(text: str) -> str:
    """Return ``text`` with its middle left out where it is long."""
    if len(text) <= MOST_CHARS:
        return text
    kept = MOST_CHARS // 2
    return f"{text[:kept]} [... {len(text) - 2 * kept:,} characters ...] {text[-kept:]}"
