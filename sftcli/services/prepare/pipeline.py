"""One preparation that has to be done: read, convert, split, render, prove, count, store."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from sftcli.config.auto import ROWS_RULES, rule_for_rows
from sftcli.config.schema.data import CHECKS, SUBSET, DataSettings, Overlong, Repeats
from sftcli.data.conversations.detect import DETECTION_ROWS, detect_schema, parse_renames
from sftcli.data.conversations.fixes import FixingRows
from sftcli.data.conversations.fixes_done import FixesDone
from sftcli.data.conversations.heldout_split import OverlapFinder, choose_heldout
from sftcli.data.conversations.keys.dropped_keys import parse_ignored
from sftcli.data.conversations.messages import RejectReason
from sftcli.data.conversations.row_reader import RowReader
from sftcli.data.conversations.trees import joined_trees
from sftcli.data.example import Example
from sftcli.data.prepared.about import MANIFESTS, AboutRows, Ends
from sftcli.data.prepared.store import (
    HELDOUT,
    TEXT,
    TRAIN,
    PreparedDataset,
    PreparedWriter,
)
from sftcli.data.quality.audit import Excluded, SupervisionAudit
from sftcli.data.quality.duplicates import DuplicateFinder, Marks, Repeated
from sftcli.data.reading.conditions import parse_conditions, wanted_records
from sftcli.data.reading.records import Fingerprint, read_records
from sftcli.data.reading.source import Source
from sftcli.data.rendering.pretraining_text import PlainTextShare
from sftcli.data.rendering.render import Row, rare_collections, row_batches
from sftcli.data.rendering.segments import ControlFinder
from sftcli.errors import DataError, Location, StoppedError
from sftcli.events import EventSink, Notice, Progressed, StopFlag
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.modeling.tokenizer.template import TemplateRefusedError
from sftcli.modeling.tokenizer.variables import parse_variables
from sftcli.services.prepare.rendering import RenderedBatch, RenderOrder
from sftcli.services.prepare.wire import pack, unpack
from sftcli.services.prepare.workers import RenderWorkers
from sftcli.version import __version__

ORDER_ONLY = (
    "order",
    "text_fraction",
    "replay",
    "as_text",
    "split_seed",  # stands in the key by itself
    *SUBSET,
)  # settings that change when a row is trained on, or what is said of it, not the row
CHUNK_ROWS = 1024  # rows between two looks at the stop flag


class NoMessagesError(DataError):
    """Rows are to be kept as messages, and one of them cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """One preparation that has to be done.

    ``prints`` tells the content of each source from any other. It is found once, before anything is read: the key stands
    for it, and rows of any other content are refused, so that none is ever stored under a key that is not theirs.
    ``workers`` is how many processes may render, beside this one. ``keeps_messages`` asks for the rows as messages too. ``fixing`` changes rows as they are read; texts have no fixes.
    """

    train: Sequence[Source]
    heldout: Sequence[Source]
    text: Sequence[Source]
    data: DataSettings
    model_folder: Path
    tokenizer: HFChatTokenizer
    seed: int
    prints: Mapping[Source, Fingerprint]
    emit: EventSink
    stop: StopFlag
    workers: int = 0
    keeps_messages: bool = False
    fixing: FixingRows | None = None
    _unwanted: Counter[Source] = field(
        default_factory=Counter, init=False
    )  # rows that do not meet the conditions
    _left_out: dict[Source, list[str]] = field(default_factory=dict, init=False)  # places, by fixes

    def key(self, *, heldout_is_open: bool = False) -> str:
        """Return a hash of all that decides the outcome: rows, settings, tokenizer, template, format, program.

        With ``heldout_is_open``, as if the share of held-out rows were still to be decided.
        """
        data = self.data.model_dump(mode="json", exclude={*CHECKS, *ORDER_ONLY, "fixes"})
        if heldout_is_open or self.data.heldout_fraction is None:
            data["heldout_fraction"] = [[rule.below, rule.heldout_fraction] for rule in ROWS_RULES]
        parts = {
            "format": MANIFESTS.version,
            "version": __version__,
            "sources": [[self.prints[source].content for source in side] for side in self._sides()],
            "data": data,
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.seed,
        }
        parts |= {"messages": True} if self.keeps_messages else {}
        parts |= {"fixes": self.fixing.fixes.content} if self.fixing else {}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def run(self, folder: Path) -> PreparedDataset:
        """Read, convert, render, split and store."""
        splits = (TRAIN, HELDOUT, TEXT) if self.text else (TRAIN, HELDOUT)
        audits = {split: SupervisionAudit(self.data.max_tokens) for split in splits}
        for note in (*self.tokenizer.notes, *map(_repetition, self.train)):
            audits[TRAIN].note(note)
        schemas: dict[str, str] = {}
        self._begin()
        with PreparedWriter(folder) as writer, self._render_workers() as workers, rare_collections():
            intake = _Intake(writer, audits)
            if self.keeps_messages:
                for split in (TRAIN, HELDOUT):
                    writer.add_messages(split, "")
            overlap = OverlapFinder()
            fraction = None
            if self.heldout or self.data.heldout_fraction == 0:
                self._take_sides(intake, workers, schemas, overlap)
            else:
                fraction = self._take_and_split(intake, workers, schemas)
            for split, found in zip((TRAIN, HELDOUT), intake.duplicates.find(), strict=True):
                audits[split].add_duplicates(found)
            if self.text:
                self._add_text(writer, audits[TEXT], schemas)
            self._check_lengths(audits)
            self._check_overlap(overlap, audits[HELDOUT])
            self._count_unread(audits)
            sources = [source.text for side in self._sides() for source in side]
            return writer.finish(
                AboutRows(
                    sources=tuple(sources),
                    schemas={source: schemas[source] for source in dict.fromkeys(sources)},
                    paths={source: tuple(sorted(paths)) for source, paths in intake.paths.items()},
                    template=self.tokenizer.template_name,
                    ends=end_tokens(self.tokenizer),
                    heldout_fraction=fraction,
                    audit={split: audit.summary() for split, audit in audits.items()},
                    fixes=self._fixes_done(intake),
                )
            )

    def _begin(self) -> None:
        """Forget what another attempt has counted."""
        self._unwanted.clear()
        self._left_out.clear()
        if self.fixing:
            self.fixing.begin()

    def _count_unread(self, audits: Mapping[str, SupervisionAudit]) -> None:
        """Count the rows that do not meet the conditions, and those that fixes leave out, on the side of their source."""
        sides = dict.fromkeys(self.heldout, audits[HELDOUT]) | dict.fromkeys(self.train, audits[TRAIN])
        for source, count in self._unwanted.items():
            sides[source].exclude(Excluded.WHERE, count=count)
        for source, places in self._left_out.items():
            for place in places:
                sides[source].exclude(Excluded.FIX, place)

    def _sides(self) -> tuple[Sequence[Source], ...]:
        return self.train, self.heldout, self.text

    def _take_sides(
        self, intake: "_Intake", workers: RenderWorkers, schemas: dict[str, str], overlap: OverlapFinder
    ) -> None:
        """Take all rows; a row is held out where its source is.

        Held-out sources are read first, so that of those trained on, which are more, nothing has to be held to compare them.
        """
        for source, batch in self._rendered(self.heldout, workers, schemas):
            for prompt, whole, result in zip(batch.prompts, batch.wholes, batch.results, strict=True):
                if prompt:
                    overlap.add_heldout(prompt, whole, result.origin)
            intake.writer.put_aside(self._aside(source, batch, is_heldout=True))
        for source, batch in self._rendered(self.train, workers, schemas):
            for prompt, whole, result in zip(batch.prompts, batch.wholes, batch.results, strict=True):
                if prompt:
                    overlap.add_trained(prompt, whole, result.origin)
            if self._drops:
                intake.writer.put_aside(self._aside(source, batch))
            else:
                intake.take(source, batch, [False] * len(batch.results))
        self._take_back(intake, lambda batch, is_heldout: [is_heldout] * len(batch.results))

    def _take_and_split(self, intake: "_Intake", workers: RenderWorkers, schemas: dict[str, str]) -> float:
        """Take all rows, and hold some of them out, which is known when the last one was read; return the share."""
        rows_per_prompt = Counter[bytes]()
        for source, batch in self._rendered(self.train, workers, schemas):
            rows_per_prompt.update(filter(None, batch.prompts))
            intake.writer.put_aside(self._aside(source, batch))
        fraction = self.data.heldout_fraction
        if fraction is None:
            fraction = rule_for_rows(rows_per_prompt.total()).heldout_fraction
        chosen = choose_heldout(
            rows_per_prompt,
            fraction=fraction,
            max_rows=self.data.heldout_max_rows,
            seed=self.seed,
        )
        del rows_per_prompt  # which is as long as the rows are many
        self._take_back(intake, lambda batch, _: [prompt in chosen for prompt in batch.prompts])
        return fraction

    def _fixes_done(self, intake: "_Intake") -> FixesDone | None:
        if self.fixing is None:
            return None
        is_whole = not self.data.where and not any(source.sample for source in (*self.train, *self.heldout))
        return self.fixing.done(set[str]().union(*intake.paths.values()), is_whole=is_whole)

    @property
    def _drops(self) -> bool:
        return Repeats.DROP in (self.data.duplicates, self.data.near_duplicates)

    def _take_back(self, intake: "_Intake", sides: Callable[[RenderedBatch, bool], Sequence[bool]]) -> None:
        """Take the rows that were put aside; where some are to be dropped, all of them are looked at first."""
        if self._drops:
            finder = DuplicateFinder()
            for _, is_heldout, batch in self._taken_back(intake.writer):
                _compare(finder, batch, sides(batch, is_heldout))
            intake.repeated = finder.repeated(
                exact=self.data.duplicates is Repeats.DROP,
                near=self.data.near_duplicates is Repeats.DROP,
                seed=self.seed,
            )
        for source, is_heldout, batch in self._taken_back(intake.writer):
            intake.take(source, batch, sides(batch, is_heldout))

    def _rendered(
        self, sources: Sequence[Source], workers: RenderWorkers, schemas: dict[str, str]
    ) -> Iterator[tuple[Source, RenderedBatch]]:
        """Yield the batches of ``sources``; fill in the format of each."""
        for source in sources:
            batches = chain.from_iterable(map(row_batches, self._chunks(source, schemas)))
            for batch in workers.render(batches):
                yield source, batch

    def _taken_back(self, writer: PreparedWriter) -> Iterator[tuple[Source, bool, RenderedBatch]]:
        for data in writer.take_back():
            if self.stop.requested():
                raise StoppedError
            is_heldout = bool(data[0])
            sources = self.heldout if is_heldout else self.train
            yield sources[int.from_bytes(data[1:5], "big")], is_heldout, unpack(data[5:])

    def _aside(self, source: Source, batch: RenderedBatch, *, is_heldout: bool = False) -> bytes:
        sources = self.heldout if is_heldout else self.train
        return bytes([is_heldout]) + sources.index(source).to_bytes(4, "big") + pack(batch)

    def _add_text(self, writer: PreparedWriter, audit: SupervisionAudit, schemas: dict[str, str]) -> None:
        share = PlainTextShare(self.tokenizer, max_tokens=self.data.max_tokens, audit=audit)
        for source in self.text:
            for chunk in self._chunks(source, schemas):
                for example in share.take(chunk, source=source.text):
                    writer.add(TEXT, example, times=source.times)
        share.note_cuts()

    def _check_lengths(self, audits: Mapping[str, SupervisionAudit]) -> None:
        """Refuse rows that are too long, where that is wanted."""
        if self.data.overlong is not Overlong.ERROR:
            return
        for audit in audits.values():
            summary = audit.summary()
            count = summary.rejected.get(RejectReason.TOO_LONG, 0)
            if count:
                named = summary.rejected_rows[RejectReason.TOO_LONG]
                more = f", and {count - len(named)} more" if count > len(named) else ""
                raise DataError(
                    f"{count} of {summary.rows} rows are longer than {self.data.max_tokens} tokens: "
                    + "; ".join(named)
                    + more,
                    hint=f"--max-tokens {summary.max_tokens_for_99_percent} keeps 99 % of them; "
                    "--overlong drop leaves them out, --overlong truncate cuts them",
                )

    def _check_overlap(self, overlap: OverlapFinder, audit: SupervisionAudit) -> None:
        """Refuse held-out rows that are trained on; only the same prompt is worth a note."""
        found = overlap.find()
        audit.add_shared_prompts(found.same_prompt)
        if found.same_prompt:
            train, held = found.examples[0]
            audit.note(
                f"of {found.heldout_rows} held-out rows, {found.same_prompt} have a prompt that is also trained on,"
                f" such as {held} and {train}; {found.same_row} are equal in all turns"
            )
        if found.same_row and not self.data.allow_leak:
            raise DataError(
                f"{found.same_row} of {found.heldout_rows} held-out rows are trained on too",
                hint="remove them from one side, or allow it: --allow-leak",
            )

    def _render_workers(self) -> RenderWorkers:
        order = RenderOrder(
            model_folder=self.model_folder,
            template=self.data.template,
            variables=parse_variables(self.data.template_variables),
            max_tokens=self.data.max_tokens,
            cuts=self.data.overlong is Overlong.TRUNCATE,
            allow_control_tokens=frozenset(author.value for author in self.data.control_tokens_from),
            train_on=self.data.train_on,
            thinking=self.data.thinking,
            compares=bool(self.train and self.heldout),
            strips_stop_text=self.data.strip_stop_text,
            keeps_messages=self.keeps_messages,
        )
        return RenderWorkers(self.tokenizer, order, count=self.workers, stop=self.stop)

    def _chunks(self, source: Source, schemas: dict[str, str]) -> Iterator[list[Row]]:
        """Yield the rows of ``source`` in segments and tell how far they are."""
        done, task, total = 0, f"preparing {source.name}", self.prints[source].rows
        if source.sample:
            total = source.sample.size(total)
        self.emit(Progressed(task=task, done=0, total=total))
        rows = self._read(source, schemas)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            if self.stop.requested():
                raise StoppedError
            yield chunk
            done += len(chunk)
            self.emit(Progressed(task=task, done=done, total=total if done <= total else 0))
        self.emit(Progressed(task=task, done=done, total=done))

    def _read(self, source: Source, schemas: dict[str, str]) -> Iterator[Row]:
        def note(text: str) -> None:
            self.emit(Notice(text=text))

        dropped = parse_ignored(self.data.ignored_keys)
        records = read_records(source, seed=self.seed, known=self.prints[source], note=note)
        if self.data.where and source not in self.text:
            records = wanted_records(
                records,
                parse_conditions(self.data.where),
                name=source.name,
                left_out=lambda: self._unwanted.update([source]),
            )
        records = joined_trees(records, name=source.name, dropped=dropped, note=note)
        first = list(islice(records, DETECTION_ROWS))
        schema = detect_schema(
            first,
            renames=parse_renames(self.data.renames),
            dropped=dropped,
        )
        schemas[source.text] = str(schema)
        reader = RowReader(
            schema=schema,
            train_on=self.data.train_on,
            first_turn=self.data.first_turn,
            score_column=self.data.score_column if source in self.train else None,
            find_control=None if self.data.allow_control_text else _control_finder(self.tokenizer).search,
            stop=self.stop,
        )
        rows = reader.read(chain(first, records))
        if self.fixing is None or source in self.text:
            return rows
        return self.fixing.apply(rows, self._left_out.setdefault(source, []).append)


def _control_finder(tokenizer: HFChatTokenizer) -> ControlFinder:
    """Return what finds control tokens, and passes over markup such as ``<think>``."""
    texts = tokenizer.control_texts.items()
    return ControlFinder({text: token for text, token in texts if token in tokenizer.control_ids})


def _repetition(source: Source) -> str:
    return f"{source.name}: an epoch has each row {source.times} times" if source.times > 1 else ""


class _Intake:
    """Where rows go once it is known whether they are held out: counted, stored, compared with each other."""

    def __init__(self, writer: PreparedWriter, audits: Mapping[str, SupervisionAudit]) -> None:
        self.writer = writer
        self.duplicates = DuplicateFinder()
        self.repeated: Repeated | None = None  # of the rows that will be taken, those that are dropped
        self.paths: dict[str, set[str]] = {}  # of examples, by source
        self._taken = 0
        self._kinds: dict[str, str] = {}  # of rows that were written as messages, the first of each
        self._audits = audits

    def take(self, source: Source, batch: RenderedBatch, heldout: Sequence[bool]) -> None:
        """Take rows of ``source``; ``heldout`` tells of each whether it is."""
        is_kept, messages = [], iter(batch.messages)
        for result, is_held in zip(batch.results, heldout, strict=True):
            split = HELDOUT if is_held else TRAIN
            is_example = isinstance(result, Example)
            line = next(messages, None) if is_example else None
            is_kept.append(is_example and not self._drop_repeated(self._audits[split]))
            if is_example and not is_kept[-1]:
                continue
            self._audits[split].add(result, source=source.text)
            if isinstance(result, Example):
                self.paths.setdefault(source.text, set()).add(result.origin.path)
                self.writer.add(split, result, times=1 if is_held else source.times)
                if line is not None:
                    self._add_messages(split, line, result)
        _compare(self.duplicates, batch, heldout, is_kept)

    def _add_messages(self, split: str, line: str, row: Example) -> None:
        if not line:
            raise NoMessagesError(
                f"{row.origin}: as messages the row would be read otherwise than it is",
                hint="leave it out, or write the rows as Parquet: --out-format parquet",
                location=Location(file=row.origin.path, line=row.origin.line),
            )
        self._kinds.setdefault(row.kind, str(row.origin))
        if len(self._kinds) > 1:
            one, other = self._kinds.values()
            raise NoMessagesError(
                f"{one} and {other} are turns and running text, which one file of messages cannot hold",
                hint="prepare them one by one, or write Parquet: --out-format parquet",
            )
        self.writer.add_messages(split, line)

    def _drop_repeated(self, audit: SupervisionAudit) -> bool:
        """Return whether the next example repeats one that stays, and count it then."""
        row, self._taken = self._taken, self._taken + 1
        if self.repeated is None or (is_exact := self.repeated.is_exact(row)) is None:
            return False
        audit.exclude(Excluded.DUPLICATE if is_exact else Excluded.NEAR_DUPLICATE, self.repeated.named(row))
        return True


def _compare(
    finder: DuplicateFinder,
    batch: RenderedBatch,
    heldout: Sequence[bool],
    is_kept: Sequence[bool] | None = None,
) -> None:
    """Give ``finder`` the examples of a batch: those that are kept, all by default."""
    rows = [
        (result.origin, is_held, is_kept is None or is_kept[index])
        for index, (result, is_held) in enumerate(zip(batch.results, heldout, strict=True))
        if isinstance(result, Example)
    ]
    left = np.array([kept for _, _, kept in rows], dtype=bool)
    finder.add(
        Marks(keys=batch.marks.keys[left], signatures=batch.marks.signatures[left]),
        [origin for origin, _, kept in rows if kept],
        [is_held for _, is_held, kept in rows if kept],
    )


def end_tokens(tokenizer: HFChatTokenizer) -> Ends:
    """Return what must be the same when a model is asked: how its template writes a turn, and which tokens end an answer."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.render(turns, tools=None, add_generation_prompt=False)
    except TemplateRefusedError as error:
        text = str(error)
    return Ends(template=text, stop_ids=tuple(sorted(tokenizer.stop_ids)))
