"""One preparation that has to be done: read, convert, split, render, prove, count, store."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from sftcli import __version__
from sftcli.config.schema.data import CHECKS, DataSettings, Overlong
from sftcli.data.conversations.detect import DETECTION_ROWS, detect_schema, parse_renames
from sftcli.data.conversations.dropped_keys import parse_ignored
from sftcli.data.conversations.heldout_split import choose_heldout, find_overlap, split_key
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.conversations.row_reader import RowReader
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
from sftcli.data.reading.records import Fingerprint, fingerprint_source, read_records
from sftcli.data.reading.source import Source
from sftcli.data.rendering.pretraining_text import PlainTextShare
from sftcli.data.rendering.render import Renderer, Row, rare_collections
from sftcli.data.rendering.segments import ControlFinder
from sftcli.errors import DataError, Location, StoppedError
from sftcli.events import EventSink, Notice, Progressed, StopFlag
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.modeling.tokenizer.template import TemplateRefusedError

ORDER_ONLY = ("order", "text_fraction")  # settings that change when a row is trained on, not the row
CHUNK_ROWS = 1024  # rows rendered together, and between two looks at the stop flag

Place = tuple[str, int, str]  # the split of a row, how many times an epoch has it, and its source


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """One preparation that has to be done.

    ``prints`` tells the content of each source from any other. It is found once, before anything is read: the key stands
    for it, and rows of any other content are refused, so that none is ever stored under a key that is not theirs.
    """

    train: Sequence[Source]
    heldout: Sequence[Source]
    text: Sequence[Source]
    data: DataSettings
    tokenizer: HFChatTokenizer
    seed: int
    prints: Mapping[Source, Fingerprint]
    emit: EventSink
    stop: StopFlag

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
        """Read, convert, split, render and store."""
        renderer = Renderer(
            self.tokenizer,
            max_tokens=self.data.max_tokens,
            cuts=self.data.overlong is Overlong.TRUNCATE,
            allow_control_tokens=frozenset(author.value for author in self.data.control_tokens_from),
        )
        splits = (TRAIN, HELDOUT, TEXT) if self.text else (TRAIN, HELDOUT)
        audits = {split: SupervisionAudit(self.data.max_tokens) for split in splits}
        for note in (*self.tokenizer.notes, *map(_repetition, self.train)):
            audits[TRAIN].note(note)
        duplicates = DuplicateFinder()
        schemas: dict[str, str] = {}
        with PreparedWriter(folder) as writer, rare_collections():
            for (split, times, source), row, result in _rendered(self._split_rows(schemas), renderer):
                audits[split].add(result, source=source)
                if isinstance(result, Example):
                    writer.add(split, result, times=times)
                    duplicates.add(row, heldout=split == HELDOUT)
            for split, found in zip((TRAIN, HELDOUT), duplicates.find(), strict=True):
                audits[split].add_duplicates(found)
            if self.text:
                self._add_text(writer, audits[TEXT], schemas)
            self._check_lengths(audits)
            self._check_overlap(audits[HELDOUT])
            self._check_unchanged()
            return writer.finish(
                {
                    "sources": [source.text for source in (*self.train, *self.heldout, *self.text)],
                    "schemas": schemas,
                    "template": self.tokenizer.template_name,
                    "ends": end_tokens(self.tokenizer),
                    "audit": {split: audit.summary().to_json() for split, audit in audits.items()},
                }
            )

    def _sides(self) -> tuple[Sequence[Source], ...]:
        return self.train, self.heldout, self.text

    def _add_text(self, writer: PreparedWriter, audit: SupervisionAudit, schemas: dict[str, str]) -> None:
        share = PlainTextShare(self.tokenizer, max_tokens=self.data.max_tokens, audit=audit)
        for source in self.text:
            for chunk in self._chunks(source, schemas):
                for example in share.take(chunk, source=source.text):
                    writer.add(TEXT, example, times=source.times)
        share.note_cuts()

    def _check_unchanged(self) -> None:
        """Refuse rows of a file that changed since the key was found, or between two of the passes over it."""
        for source, known in self.prints.items():
            if fingerprint_source(source) != known:
                raise DataError(
                    f"{source.name}: changed while it was prepared; nothing was kept",
                    hint="wait until it is written, then run again",
                    location=Location(file=source.name),
                )

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

    def _check_overlap(self, audit: SupervisionAudit) -> None:
        """Refuse held-out rows that are trained on; only the same prompt is worth a note."""
        if not (self.train and self.heldout):
            return
        verb = "comparing"
        found = find_overlap(self._conversations(self.train, verb), self._conversations(self.heldout, verb))
        audit.add_shared_prompts(found.same_prompt)
        if found.same_prompt:
            train, held = found.examples[0]
            audit.note(
                f"of {found.heldout_rows} held-out rows, {found.same_prompt} have a prompt that is trained on too,"
                f" such as {held} and {train}; {found.same_row} are equal in all turns"
            )
        if found.same_row and not self.data.allow_leak:
            raise DataError(
                f"{found.same_row} of {found.heldout_rows} held-out rows are trained on too",
                hint="take them out of one side, or allow it: --allow-leak",
            )

    def _conversations(self, sources: Sequence[Source], verb: str) -> Iterator[Conversation]:
        for source in sources:
            for row in chain.from_iterable(self._chunks(source, {}, verb)):
                if isinstance(row, Conversation):
                    yield row

    def _split_rows(self, schemas: dict[str, str]) -> Iterator[tuple[Place, Row]]:
        """Yield rows with the split that they belong to; fill in the format of each source."""
        flags, totals = self._choose_heldout()
        chosen = iter(flags)
        for source in self.train:
            kept, held = (TRAIN, source.times, source.text), (HELDOUT, 1, source.text)
            for row in chain.from_iterable(self._chunks(source, schemas, total=totals.get(source, 0))):
                is_held = isinstance(row, Conversation) and next(chosen, 0)
                yield held if is_held else kept, row
        for source in self.heldout:
            for row in chain.from_iterable(self._chunks(source, schemas)):
                yield (HELDOUT, 1, source.text), row

    def _choose_heldout(self) -> tuple[bytes, Mapping[Source, int]]:
        """Return 1 for each training conversation that is held out and 0 for others, and how many rows a source has.

        It takes a pass of its own over the rows, and returns nothing where it would hold out nothing.
        """
        if self.heldout or not self.data.heldout_fraction:
            return b"", {}
        keys: list[bytes] = []
        totals = Counter[Source]()
        for source in self.train:
            for chunk in self._chunks(source, {}, "reading"):
                totals[source] += len(chunk)
                keys += [split_key(row) for row in chunk if isinstance(row, Conversation)]
        chosen = choose_heldout(
            Counter(keys),
            fraction=self.data.heldout_fraction,
            max_rows=self.data.heldout_max_rows,
            seed=self.seed,
        )
        return bytes(key in chosen for key in keys), totals

    def _chunks(
        self, source: Source, schemas: dict[str, str], verb: str = "preparing", total: int = 0
    ) -> Iterator[list[Row]]:
        """Yield the rows of ``source`` in segments and tell how far they are; ``total`` is 0 where it is not known."""
        rows, done, task = self._read(source, schemas), 0, f"{verb} {source.name}"
        self.emit(Progressed(task=task, done=0, total=total))
        while chunk := list(islice(rows, CHUNK_ROWS)):
            if self.stop.requested():
                raise StoppedError
            yield chunk
            done += len(chunk)
            self.emit(Progressed(task=task, done=done, total=total))
        self.emit(Progressed(task=task, done=done, total=done))

    def _read(self, source: Source, schemas: dict[str, str]) -> Iterator[Row]:
        records = read_records(source, seed=self.seed, note=lambda text: self.emit(Notice(text=text)))
        first = list(islice(records, DETECTION_ROWS))
        schema = detect_schema(
            first,
            renames=parse_renames(self.data.renames),
            dropped=parse_ignored(self.data.ignored_keys),
        )
        schemas[source.text] = str(schema)
        reader = RowReader(
            schema=schema,
            train_on=self.data.train_on,
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


def _rendered(
    rows: Iterator[tuple[Place, Row]], renderer: Renderer
) -> Iterator[tuple[Place, Row, Example | Rejected]]:
    """Render ``rows``, which the renderer reads ahead, and hand each on with where it belongs; examples get its score."""
    waiting = deque[tuple[Place, Row]]()

    def without_places() -> Iterator[Row]:
        for place, row in rows:
            waiting.append((place, row))
            yield row

    for result in renderer.render_all(without_places()):
        place, row = waiting.popleft()
        if isinstance(result, Example) and isinstance(row, Conversation) and row.score is not None:
            result = replace(result, score=row.score)
        yield place, row, result


def end_tokens(tokenizer: HFChatTokenizer) -> dict[str, object]:
    """Return what must be the same when a model is asked: how its template writes a turn, and which tokens end an answer."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.render(turns, tools=None, add_generation_prompt=False)
    except TemplateRefusedError as error:
        text = str(error)
    return {"template": text, "stop_ids": sorted(tokenizer.stop_ids)}
