"""Data to prepared examples: read, convert, split, render, prove, count, store. Done once for the same input."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema import DataSettings
from sftcli.data.audit import AuditSummary, SupervisionAudit
from sftcli.data.conversation import Conversation, PlainText, Rejected, detect_schema, to_conversations
from sftcli.data.prepared import (
    FORMAT_VERSION,
    HELDOUT,
    TRAIN,
    PreparedDataset,
    PreparedWriter,
    open_prepared,
)
from sftcli.data.records import Source, fingerprint_source, parse_source, read_records
from sftcli.data.render import Renderer
from sftcli.data.split import is_heldout
from sftcli.errors import DataError, UsageError
from sftcli.events import DataPrepared, EventSink, Notice, Progressed, StopFlag, Warned
from sftcli.modeling.cache import cache_folder
from sftcli.modeling.tokenizer import HFChatTokenizer, load_chat_tokenizer

DETECTION_ROWS = 200
CHUNK_ROWS = 512  # rows rendered together, and between two looks at the stop flag


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOutcome:
    """What was prepared."""

    dataset: PreparedDataset
    tokenizer: HFChatTokenizer
    audit: dict[str, object]
    event: DataPrepared


def prepare_data(
    data: DataSettings, *, model_folder: Path, seed: int, emit: EventSink, stop: StopFlag
) -> PrepareOutcome:
    """Return the examples of ``data`` as the model in ``model_folder`` will see them, from the cache where possible.

    Raises:
        UsageError: No source was named.
        DataError: A file cannot be read, its format is not known, or no row is left to train on.
        NotFoundError, NetworkError: A source is not there.
    """
    if not data.sources:
        raise UsageError(
            "there is no data to train on", hint="name a file or a hub data set: --data rows.jsonl, or use a preset"
        )
    tokenizer = load_chat_tokenizer(model_folder)
    train = [parse_source(text) for text in data.sources]
    heldout = [parse_source(text) for text in data.heldout_sources]
    key = _cache_key(data, [*train, *heldout], tokenizer, seed)
    folder = cache_folder() / "prepared" / key
    dataset = _open_cached(folder, emit)
    cached = dataset is not None
    if dataset is None:
        dataset = _Preparation(data, tokenizer, seed, emit, stop).run(train, heldout, folder)
    event = _describe(dataset, data, cached=cached)
    emit(event)
    return PrepareOutcome(dataset=dataset, tokenizer=tokenizer, audit=dict(dataset.about), event=event)
