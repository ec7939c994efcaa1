"""Data to prepared examples: read, convert, split, render, prove, count, store. Done once for the same input."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sftcli import storage
from sftcli.cache import cache_folder
from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.settings import Settings
from sftcli.data.conversations.fixes import FixingRows, read_fixes
from sftcli.data.conversations.formats import RowFormat
from sftcli.data.conversations.tokenized import LABELS_COLUMN, MASK_COLUMNS
from sftcli.data.example import Example
from sftcli.data.prepared.messages import write_messages
from sftcli.data.prepared.parquet import write_rows
from sftcli.data.prepared.store import TEXT, TRAIN, PreparedDataset, open_prepared
from sftcli.data.prepared.subset import ChosenRows, with_subset
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.data.quality.thresholds import Fitness, assess_rows, reasons_with_rows, remedy_for
from sftcli.data.reading.records import fingerprint_source
from sftcli.data.rendering.token_view import TokenView, describe_tokens
from sftcli.errors import DataError, Location, OutputError, SftError, StorageError, UsageError
from sftcli.events import DataPrepared, EventSink, Notice, Session, Warned
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.modeling.tokenizer.variables import parse_variables
from sftcli.services.models.base import locate_base, tokenizer_folder
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.doubts import heldout_doubts
from sftcli.services.prepare.markers import check_markers
from sftcli.services.prepare.pipeline import Preparation
from sftcli.services.prepare.sources import Sources, find_sources
from sftcli.services.prepare.workers import worker_count
from sftcli.services.runs.lock import OutputLock

_OTHER_OUT = "choose another place with --out"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Examples, and the tokenizer that made them."""

    dataset: PreparedDataset
    tokenizer: HFChatTokenizer
    is_cached: bool  # they were prepared before

    @property
    def audit(self) -> Mapping[str, AuditSummary]:
        """What became of the rows, for ``train``, ``heldout`` and, where there is some, ``text``."""
        return self.dataset.about.audit

    def describe(self) -> DataPrepared:
        """Return the counts as an event."""
        audit = {split: part for split, part in self.audit.items() if split != TEXT}
        train = self.dataset.train
        tokens, response_tokens = audit[TRAIN].tokens, audit[TRAIN].response_tokens
        if isinstance(train, ChosenRows):
            tokens = sum(train.num_tokens)
            response_tokens = sum(int(train[row].loss_mask.sum()) for row in range(len(train)))
        return DataPrepared(
            source=", ".join(self.dataset.about.sources),
            schema="; ".join(dict.fromkeys(self.dataset.about.schemas.values())),
            rows=sum(part.rows for part in audit.values()),
            kept=sum(part.kept for part in audit.values()),
            rejected=dict(sum((Counter(part.rejected) for part in audit.values()), Counter[str]())),
            train_examples=len(train),
            heldout_examples=len(self.dataset.heldout),
            train_tokens=tokens,
            response_tokens=response_tokens,
            cached=self.is_cached,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """Prepare the data of ``settings``; hand back the first ``show`` training examples; write all to ``out``."""

    settings: Settings
    show: int
    out: Path | None = None
    as_messages: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """An example token by token, with its counts and what was noticed about it."""

    origin: str
    num_tokens: int
    num_trained: int
    flags: tuple[str, ...]
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOutcome:
    """What was prepared, where, the first examples token by token, whether it is good enough, and where all were written."""

    data: PreparedData
    shown: tuple[ShownRow, ...]
    fitness: Fitness
    out: str | None

    @property
    def folder(self) -> str:
        """Folder of the prepared data."""
        return str(self.data.dataset.folder)

    def to_json(self) -> dict[str, object]:
        """Return the outcome as plain values."""
        return {
            "folder": self.folder,
            "cached": self.data.is_cached,
            **self.data.dataset.about.to_json(),
            "out": self.out,
            "shown": [asdict(row) for row in self.shown],
        }


def run_prepare(request: PrepareRequest, session: Session) -> PrepareOutcome:
    """Prepare data as ``train`` would, and show what became of it.

    Raises:
        OutputError: ``out`` exists, another process makes it, or it cannot be written.
        DataError, UsageError, StorageError: As ``prepare_data``, or no row is left.
    """
    sources = find_sources(request.settings.data)
    if request.out is None:
        return _prepare(request, sources, session)
    storage.require_new(request.out, hint=_OTHER_OUT)
    if request.as_messages and not request.settings.data.takes_all:
        raise UsageError(
            "all rows are written as messages, and data.train_share or data.leave_out takes a part of them",
            hint="write Parquet: --out-format parquet",
            location=Location(key="data.train_share"),
        )
    with OutputLock(request.out, session.emit):
        storage.require_new(request.out, hint=_OTHER_OUT)  # another process may have made it meanwhile
        return _prepare(request, sources, session)


def _prepare(request: PrepareRequest, sources: Sources, session: Session) -> PrepareOutcome:
    settings = request.settings
    located = locate_base(settings.model, session.emit)
    data = prepare_rows(
        settings,
        sources=sources,
        model_folder=tokenizer_folder(settings, located),
        session=session,
        keeps_messages=request.out is not None and request.as_messages,
    )
    require_rows(data)
    require_room(data, located.folder, session.emit)
    train, heldout = data.dataset.train, data.dataset.heldout
    for doubt in heldout_doubts(settings, train_rows=len(train), heldout_rows=len(heldout)):
        session.emit(Warned(text=doubt))
    if settings.data.replay:
        session.emit(
            Notice(text="data.replay takes effect in training alone: nothing of earlier runs is prepared")
        )
    audits = list(data.audit.values())
    fitness = assess_rows(audits, settings.data)
    is_written = request.out is not None and fitness.is_good
    if request.out and is_written:
        write = write_messages if request.as_messages else write_rows
        write(data.dataset, request.out)
    return PrepareOutcome(
        data=data,
        shown=tuple(_shown(train[row], data.tokenizer) for row in range(min(request.show, len(train)))),
        fitness=fitness,
        out=str(request.out) if is_written else None,
    )


def _shown(example: Example, tokenizer: HFChatTokenizer) -> ShownRow:
    return ShownRow(
        origin=str(example.origin),
        num_tokens=len(example.input_ids),
        num_trained=int(example.loss_mask.sum()),
        flags=tuple(sorted(example.flags)),
        tokens=tuple(describe_tokens(example, tokenizer)),
    )


def prepare_rows(
    settings: Settings,
    *,
    model_folder: Path,
    session: Session,
    sources: Sources | None = None,
    fallback: Path | None = None,
    keeps_messages: bool = False,
) -> PreparedData:
    """Prepare the rows that ``settings`` name, split by their seed, as ``prepare_data`` does; ``sources`` where they are found already."""
    return prepare_data(
        settings.data,
        find_sources(settings.data) if sources is None else sources,
        model_folder=model_folder,
        seed=settings.rows_seed,
        session=session,
        fallback=fallback,
        keeps_messages=keeps_messages,
    )


def prepare_data(
    data: DataSettings,
    sources: Sources,
    *,
    model_folder: Path,
    seed: int,
    session: Session,
    fallback: Path | None = None,
    workers: int | None = None,
    keeps_messages: bool = False,
) -> PreparedData:
    """Return the examples of ``data`` as the model in ``model_folder`` will see them, from the cache where possible.

    Where there is no cache folder that can be written to, or its disk is full, they go to ``fallback``. ``workers`` is how
    many processes may render; where it is not given, the machine decides. ``keeps_messages`` keeps the rows as messages too.

    Raises:
        DataError: A file cannot be read, or its format is not known.
        NotFoundError, NetworkError: A source is not there.
        UsageError: The template ends an answer with what is no token.
        StoppedError: ``stop`` was set.
    """
    emit = session.emit
    tokenizer = load_chat_tokenizer(
        model_folder, template=data.template, variables=parse_variables(data.template_variables)
    )
    check_markers(tokenizer, emit)
    job = Preparation(
        train=sources.train,
        heldout=sources.heldout,
        text=sources.text,
        data=data,
        model_folder=model_folder,
        tokenizer=tokenizer,
        seed=seed,
        prints={source: fingerprint_source(source) for source in sources.all()},
        emit=emit,
        stop=session.stop,
        workers=worker_count() if workers is None else workers,
        keeps_messages=keeps_messages,
        fixing=None if data.fixes is None else FixingRows(read_fixes(data.fixes)),
    )
    store, key = _store(fallback, emit), job.key()
    dataset = _found(job, key, [store] if fallback in (None, store) else [store, fallback], emit)
    whole = dataset or _made(job, store, key, fallback, emit)
    prepared = PreparedData(
        dataset=with_subset(whole, data),
        tokenizer=tokenizer,
        is_cached=dataset is not None,
    )
    emit(prepared.describe())
    if (fixed := whole.about.fixes) is not None:
        text = f"{data.fixes}: {fixed.in_words()}"
        emit(Warned(text=text) if fixed.missing else Notice(text=text))
    if (chosen := len(prepared.dataset.train)) < len(whole.train):
        emit(Notice(text=f"training on {chosen:,} of {len(whole.train):,} rows ({_subset_text(data)})"))
    if not data.as_text and (texts := _texts_among_rows(prepared, sources)):
        emit(
            Warned(
                text=f"{', '.join(texts)}: rows of pretraining text, every token of which is trained; if that is meant: --as-text;"
                f" to mix them into other rows: --set data.text_sources={texts[0]}"
            )
        )
    if sources.text and not data.text_fraction:
        emit(Notice(text="data.text_fraction is 0: the pretraining text is prepared but not trained on"))
    return prepared


def _subset_text(data: DataSettings) -> str:
    parts = [f"data.train_share {data.train_share:g}"] if data.train_share < 1 else []
    return "; ".join([*parts, *(f"without {name}" for name in data.leave_out)])


def _texts_among_rows(prepared: PreparedData, sources: Sources) -> list[str]:
    """Return the sources of rows that hold pretraining text."""
    schemas = prepared.dataset.about.schemas
    names = dict.fromkeys(source.text for source in (*sources.train, *sources.heldout))
    return [name for name in names if _trains_all(schemas.get(name, ""))]


def _trains_all(schema: str) -> bool:
    """Return whether rows of a format, as it is told, are trained whole: texts, and token ids with nothing that says otherwise."""
    columns = schema.partition(";")[0]
    if columns.startswith(f"{RowFormat.TOKENS} rows"):
        return not any(name in columns for name in (LABELS_COLUMN, *MASK_COLUMNS))
    return columns.startswith(f"{RowFormat.TEXT} rows")


def require_rows(prepared: PreparedData) -> None:
    """See that there is something to train on.

    Raises:
        DataError: All rows were rejected; the first of each reason is named.
    """
    audit = prepared.audit[TRAIN]
    if audit.kept or not audit.rows:
        return
    reasons = Counter(audit.rejected)
    found = reasons_with_rows([audit], reasons)
    raise DataError(
        f"{'the only row was' if audit.rows == 1 else f'all {audit.rows:,} rows were'} rejected ({found})",
        hint=remedy_for([audit], reasons),
    )


def _found(job: Preparation, key: str, stores: Sequence[Path], emit: EventSink) -> PreparedDataset | None:
    """Return what was prepared before, also where the share of held-out rows was decided then that is asked for now."""
    for store in stores:
        if (dataset := _open_cached(store / key, emit)) is not None:
            return dataset
    open_key = job.key(heldout_is_open=True)
    for store in stores:
        dataset = _open_cached(store / open_key, emit)
        if dataset is not None and dataset.about.heldout_fraction == job.data.heldout_fraction:
            return dataset
    return None


def _store(fallback: Path | None, emit: EventSink) -> Path:
    try:
        return cache_folder() / "prepared"
    except OutputError as error:
        if fallback is None:
            raise
        emit(_moved(error, fallback))
        return fallback


def _made(job: Preparation, store: Path, key: str, fallback: Path | None, emit: EventSink) -> PreparedDataset:
    try:
        return job.run(store / key)
    except StorageError as error:
        if fallback in (None, store):
            raise
        emit(_moved(error, fallback))
        return job.run(fallback / key)


def _moved(why: SftError, fallback: Path) -> Warned:
    return Warned(text=f"{why.message}; prepared data goes to {fallback}; {why.hint}")


def _open_cached(folder: Path, emit: EventSink) -> PreparedDataset | None:
    if not folder.exists():
        return None
    try:
        return open_prepared(folder)
    except DataError as error:
        emit(Warned(text=f"{error.message}; preparing it again"))
        storage.discard(folder)
        return None
