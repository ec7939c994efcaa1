"""One preparation that has to be done: read, convert, split, render, prove, count, store."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from sftcli import __version__
from sftcli.config.schema.data import CHECKS, DataSettings, Overlong
from sftcli.data.conversations.detect import DETECTION_ROWS, detect_schema, parse_renames
from sftcli.data.conversations.dropped_keys import parse_ignored
from sftcli.data.conversations.heldout_split import OverlapFinder, choose_heldout
from sftcli.data.conversations.messages import RejectReason
from sftcli.data.conversations.row_reader import RowReader
from sftcli.data.conversations.trees import joined_trees
from sftcli.data.example import Example
from sftcli.data.prepared.store import (
    FORMAT_VERSION,
    HELDOUT,
    TEXT,
    TRAIN,
    PreparedDataset,
    PreparedWriter,
)
from sftcli.data.quality.audit import SupervisionAudit
from sftcli.data.quality.duplicates import DuplicateFinder
from sftcli.data.reading.records import Fingerprint, read_records
from sftcli.data.reading.source import Source
from sftcli.data.rendering.pretraining_text import PlainTextShare
from sftcli.data.rendering.render import Row, rare_collections, row_batches
from sftcli.data.rendering.segments import ControlFinder
from sftcli.errors import DataError, StoppedError
from sftcli.events import EventSink, Notice, Progressed, StopFlag
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.modeling.tokenizer.template import TemplateRefusedError
from sftcli.modeling.tokenizer.variables import parse_variables
from sftcli.services.prepare.rendering import RenderedBatch, RenderOrder
from sftcli.services.prepare.wire import pack, unpack
from sftcli.services.prepare.workers import RenderWorkers

ORDER_ONLY = (
    "order",
    "text_fraction",
    "as_text",
)  # settings that change when a row is trained on, or what is said of it, not the row
CHUNK_ROWS = 1024  # rows between two looks at the stop flag


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """One preparation that has to be done.

    ``prints`` tells the content of each source from any other. It is found once, before anything is read: the key stands
    for it, and rows of any other content are refused, so that none is ever stored under a key that is not theirs.
    ``workers`` is how many processes may render, beside this one.
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

    def key(self) -> str:
        """Return a hash of all that decides the outcome: rows, settings, tokenizer, template, format, program."""
        parts = {
            "format": FORMAT_VERSION,
            "version": __version__,
            "sources": [[self.prints[source].content for source in side] for side in self._sides()],
            "data": self.data.model_dump(mode="json", exclude={*CHECKS, *ORDER_ONLY}),
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def run(self, folder: Path) -> PreparedDataset:
        """Read, convert, render, split and store."""
        splits = (TRAIN, HELDOUT, TEXT) if self.text else (TRAIN, HELDOUT)
        audits = {split: SupervisionAudit(self.data.max_tokens) for split in splits}
        for note in (*self.tokenizer.notes, *map(_repetition, self.train)):
            audits[TRAIN].note(note)
        schemas: dict[str, str] = {}
        with PreparedWriter(folder) as writer, self._render_workers() as workers, rare_collections():
            intake = _Intake(writer, audits)
            overlap = OverlapFinder()
            if self.heldout or not self.data.heldout_fraction:
                self._take_sides(intake, workers, schemas, overlap)
            else:
                self._take_and_split(intake, workers, schemas)
            for split, found in zip((TRAIN, HELDOUT), intake.duplicates.find(), strict=True):
                audits[split].add_duplicates(found)
            if self.text:
                self._add_text(writer, audits[TEXT], schemas)
            self._check_lengths(audits)
            self._check_overlap(overlap, audits[HELDOUT])
            sources = [source.text for side in self._sides() for source in side]
            return writer.finish(
                {
                    "sources": sources,
                    "schemas": {source: schemas[source] for source in dict.fromkeys(sources)},
                    "template": self.tokenizer.template_name,
                    "ends": end_tokens(self.tokenizer),
                    "audit": {split: audit.summary().to_json() for split, audit in audits.items()},
                }
            )

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
            intake.writer.put_aside(self._aside(source, batch))
        for source, batch in self._rendered(self.train, workers, schemas):
            for prompt, whole, result in zip(batch.prompts, batch.wholes, batch.results, strict=True):
                if prompt:
                    overlap.add_trained(prompt, whole, result.origin)
            intake.take(source, batch, [False] * len(batch.results))
        for source, batch in self._taken_back(intake.writer):
            intake.take(source, batch, [True] * len(batch.results))

    def _take_and_split(self, intake: "_Intake", workers: RenderWorkers, schemas: dict[str, str]) -> None:
        """Take all rows, and hold some of them out, which is known when the last one was read."""
        rows_per_prompt = Counter[bytes]()
        for source, batch in self._rendered(self.train, workers, schemas):
            rows_per_prompt.update(filter(None, batch.prompts))
            intake.writer.put_aside(self._aside(source, batch))
        chosen = choose_heldout(
            rows_per_prompt,
            fraction=self.data.heldout_fraction,
            max_rows=self.data.heldout_max_rows,
            seed=self.seed,
        )
        del rows_per_prompt  # which is as long as the rows are many
        for source, batch in self._taken_back(intake.writer):
            intake.take(source, batch, [prompt in chosen for prompt in batch.prompts])

    def _rendered(
        self, sources: Sequence[Source], workers: RenderWorkers, schemas: dict[str, str]
    ) -> Iterator[tuple[Source, RenderedBatch]]:
        """Yield the batches of ``sources``; fill in the format of each."""
        for source in sources:
            batches = chain.from_iterable(map(row_batches, self._chunks(source, schemas)))
            for batch in workers.render(batches):
                yield source, batch

    def _taken_back(self, writer: PreparedWriter) -> Iterator[tuple[Source, RenderedBatch]]:
        for data in writer.take_back():
            if self.stop.requested():
                raise StoppedError
            yield (*self.train, *self.heldout)[int.from_bytes(data[:4], "big")], unpack(data[4:])

    def _aside(self, source: Source, batch: RenderedBatch) -> bytes:
        return (*self.train, *self.heldout).index(source).to_bytes(4, "big") + pack(batch)

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
        read = read_records(source, seed=self.seed, known=self.prints[source], note=note)
        records = joined_trees(read, name=source.name, dropped=dropped, note=note)
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
        return reader.read(chain(first, records))


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
        self._audits = audits

    def take(self, source: Source, batch: RenderedBatch, heldout: Sequence[bool]) -> None:
        """Take rows of ``source``; ``heldout`` tells of each whether it is."""
        origins, sides = [], []
        for result, is_held in zip(batch.results, heldout, strict=True):
            split = HELDOUT if is_held else TRAIN
            self._audits[split].add(result, source=source.text)
            if isinstance(result, Example):
                self.writer.add(split, result, times=1 if is_held else source.times)
                origins.append(result.origin)
                sides.append(is_held)
        self.duplicates.add(batch.marks, origins, sides)


def end_tokens(tokenizer: HFChatTokenizer) -> dict[str, object]:
    """Return what must be the same when a model is asked: how its template writes a turn, and which tokens end an answer."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.render(turns, tools=None, add_generation_prompt=False)
    except TemplateRefusedError as error:
        text = str(error)
    return {"template": text, "stop_ids": sorted(tokenizer.stop_ids)}
