"""Data to prepared examples: read, convert, split, render, prove, count, store. Done once for the same input."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

from sftcli.config.schema import DataSettings
from sftcli.config.sources import Settings
from sftcli.data.audit import SupervisionAudit
from sftcli.data.conversation import (
    DETECTION_ROWS,
    Conversation,
    PlainText,
    Rejected,
    detect_schema,
    to_conversations,
)
from sftcli.data.prepared import FORMAT_VERSION, HELDOUT, TRAIN, PreparedDataset, PreparedWriter, open_prepared
from sftcli.data.records import RawRecord, Source, fingerprint_source, parse_source, read_records
from sftcli.data.render import Renderer
from sftcli.data.split import choose_heldout, split_key
from sftcli.errors import DataError, StoppedError, UsageError
from sftcli.events import DataPrepared, EventSink, Notice, Progressed, StopFlag, Warned
from sftcli.modeling.cache import cache_folder
from sftcli.modeling.locate import locate_model
from sftcli.modeling.tokenizer import HFChatTokenizer, load_chat_tokenizer

CHUNK_ROWS = 1024  # rows rendered together, and between two looks at the stop flag

Row = Conversation | PlainText | Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Examples, and the tokenizer that made them."""

    dataset: PreparedDataset
    tokenizer: HFChatTokenizer
    event: DataPrepared


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """Prepare the data of ``settings``; hand back the first ``show`` training examples."""

    settings: Settings
    show: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOutcome:
    """What was prepared, where, and the first examples token by token."""

    data: PreparedData
    shown: tuple[tuple[TokenView, ...], ...]

    @property
    def folder(self) -> str:
        """Folder of the prepared data."""
        return str(self.data.dataset.folder)

    def to_json(self) -> dict[str, object]:
        """Return the outcome as plain values."""
        shown = [[asdict(token) for token in row] for row in self.shown]
        return {"folder": self.folder, "cached": self.data.event.cached, **self.data.dataset.about, "shown": shown}


def run_prepare(request: PrepareRequest, emit: EventSink, stop: StopFlag) -> PrepareOutcome:
    """Prepare data as ``train`` would, and show what became of it."""
    settings = request.settings
    located = locate_model(settings.model.name, revision=settings.model.revision, emit=emit)
    data = prepare_data(settings.data, model_folder=located.folder, seed=settings.training.seed, emit=emit, stop=stop)
    train = data.dataset.train
    shown = [describe_tokens(train[row], data.tokenizer) for row in range(min(request.show, len(train)))]
    return PrepareOutcome(data=data, shown=tuple(map(tuple, shown)))


def prepare_data(
    data: DataSettings, *, model_folder: Path, seed: int, emit: EventSink, stop: StopFlag
) -> PreparedData:
    """Return the examples of ``data`` as the model in ``model_folder`` will see them, from the cache where possible.

    Raises:
        UsageError: No source was named.
        DataError: A file cannot be read, or its format is not known.
        NotFoundError, NetworkError: A source is not there.
        StoppedError: ``stop`` was set.
    """
    if not data.sources and not data.heldout_sources:
        raise UsageError(
            "there is no data to train on", hint="name a file or a hub data set: --data rows.jsonl, or use a preset"
        )
    tokenizer = load_chat_tokenizer(model_folder)
    job = _Job(
        train=tuple(map(parse_source, data.sources)),
        heldout=tuple(map(parse_source, data.heldout_sources)),
        data=data,
        tokenizer=tokenizer,
        seed=seed,
        emit=emit,
        stop=stop,
    )
    folder = cache_folder() / "prepared" / job.key()
    dataset = _open_cached(folder, emit)
    event = job.event(dataset or job.run(folder), cached=dataset is not None)
    emit(event)
    return PreparedData(dataset=dataset or open_prepared(folder), tokenizer=tokenizer, event=event)


def _open_cached(folder: Path, emit: EventSink) -> PreparedDataset | None:
    if not folder.exists():
        return None
    try:
        return open_prepared(folder)
    except DataError as error:
        emit(Warned(text=f"{error.message}; preparing it again"))
        shutil.rmtree(folder)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One preparation that has to be done."""

    train: Sequence[Source]
    heldout: Sequence[Source]
    data: DataSettings
    tokenizer: HFChatTokenizer
    seed: int
    emit: EventSink
    stop: StopFlag

    def key(self) -> str:
        """Return a hash of all that decides the outcome: rows, settings, tokenizer, template, format, program."""
        parts = {
            "format": FORMAT_VERSION,
            "version": __version__,
            "train": [fingerprint_source(source) for source in self.train],
            "heldout": [fingerprint_source(source) for source in self.heldout],
            "data": self.data.model_dump(mode="json"),
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def run(self, folder: Path) -> PreparedDataset:
        """Prepare and store."""
        audits = {split: SupervisionAudit() for split in (TRAIN, HELDOUT)}
        schemas: dict[str, str] = {}
        with PreparedWriter(folder) as writer:
            for split, rows in self._rows(schemas):
                audit = audits[split]
                for result in self._renderer.render_all(rows):
                    audit.add(result)
                    if isinstance(result, Example):
                        writer.add(split, result)
            about = {
                "sources": [source.text for source in (*self.train, *self.heldout)],
                "schemas": schemas,
                "template": self.tokenizer.template_name,
                "audit": {split: audit.summary().to_json() for split, audit in audits.items()},
            }
            return writer.finish(about)
