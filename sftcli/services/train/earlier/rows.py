"""Rows of earlier runs: found where they are prepared, drawn with the seed, and kept in the folder of the new run.

The folder makes a run independent of what becomes of the earlier ones: resumed, it trains on the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sftcli import storage
from sftcli.cache import cache_folder
from sftcli.config.schema.settings import Settings
from sftcli.data.example import Example
from sftcli.data.prepared.about import AboutEarlier, EarlierPart
from sftcli.data.prepared.store import (
    HELDOUT,
    TRAIN,
    ExampleTable,
    PreparedDataset,
    PreparedWriter,
    open_prepared,
)
from sftcli.data.quality.audit import SupervisionAudit
from sftcli.errors import DataError, SftError, StoppedError
from sftcli.events import Event, Notice, Progressed, Session, Warned
from sftcli.services.models.base import locate_base, tokenizer_folder
from sftcli.services.prepare.prepare import PreparedData, prepare_rows
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.lineage import folder_of, lineage_of, names_of
from sftcli.services.runs.record import Ancestor
from sftcli.services.runs.trained_rows import prepared_rows_of
from sftcli.services.train.resuming.changes import REPLAYED_ROWS

REPLAYED = "replayed"  # key of the audit, beside the splits
_STREAM = 2  # keeps this draw apart from others of the same seed


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRows:
    """Rows of the runs that a run trains on from, the oldest run first."""

    lineage: tuple[Ancestor, ...]  # the nearest first
    parts: tuple[EarlierPart, ...]
    dataset: PreparedDataset  # its training rows are those that are replayed

    @property
    def replayed(self) -> int:
        """How many rows are replayed."""
        return len(self.dataset.train)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return what tells replayed rows from any others; nothing where there are none."""
        return {REPLAYED_ROWS: self.dataset.fingerprint} if self.replayed else {}

    def heldout(self) -> Iterator[tuple[str, range]]:
        """Yield each run that held rows out, and where they are."""
        begin = 0
        for part in self.parts:
            if part.heldout:
                yield part.run, range(begin, begin + part.heldout)
            begin += part.heldout

    def joined_to(self, prepared: PreparedData) -> PreparedData:
        """Return ``prepared`` with the replayed rows behind its own, counted in its audit."""
        if not self.replayed:
            return prepared
        audit = {REPLAYED: self.dataset.about_earlier.audit}
        return replace(prepared, dataset=prepared.dataset.joined(self.dataset.train, audit))

    def in_words(self, rows: int) -> str:
        """Return what is replayed among ``rows`` training rows."""
        counts = ", ".join(
            f"{part.replayed:,} of {part.run}"
            + (f", whose {part.replayable:,} rows are repeated" if part.replayed > part.replayable else "")
            for part in self.parts
            if part.replayed
        )
        return f"replay: {self.replayed:,} of {rows:,} training rows ({self.replayed / rows:.0%}) are replayed: {counts}"

    def doubt(self) -> str:
        """Return what to say where the rows of the earlier run are left out."""
        return f"training on from {self.lineage[0].run} without its rows, so that what it learned may be lost; to mix some in"


def find_earlier(
    settings: Settings, prepared: PreparedData, session: Session, *, run: RunFolder | None
) -> EarlierRows | None:
    """Return the rows of the runs that ``settings`` train on from, as ``run`` has them; None where they start from no run.

    Raises:
        DataError: Rows are to be replayed, and those of a run cannot be had any more.
    """
    lineage = (None if run is None else run.record().lineage) or lineage_of(settings)
    if not lineage:
        return None
    asked = {
        "lineage": [asdict(one) for one in lineage],
        "replay": settings.data.replay,
        "seed": settings.training.seed,
        "max_tokens": settings.data.max_tokens,
        "rows": prepared.dataset.fingerprint,
    }
    place = (
        cache_folder() / "prepared" / f"earlier-{prepared.dataset.fingerprint[:24]}"
        if run is None
        else run.earlier
    )
    dataset = _kept(place, asked)
    if dataset is None:
        if place.exists():
            storage.discard(place)
        dataset = _gathered(place, asked, lineage, settings, prepared, session)
    return EarlierRows(lineage=lineage, parts=dataset.about_earlier.parts, dataset=dataset)


def _kept(place: Path, asked: Mapping[str, object]) -> PreparedDataset | None:
    if not place.exists():
        return None
    try:
        found = open_prepared(place)
        return found if found.about_earlier.asked == asked else None
    except DataError:
        return None


def _gathered(
    place: Path,
    asked: Mapping[str, object],
    lineage: Sequence[Ancestor],
    settings: Settings,
    prepared: PreparedData,
    session: Session,
) -> PreparedDataset:
    """Find the rows of the runs of ``lineage``, draw those that are replayed, and keep them in ``place``."""
    names = names_of(lineage)
    found = {names[one]: _rows_of(one, settings, session) for one in reversed(lineage)}
    known = {run: rows for run, rows in found.items() if rows is not None}
    share, own = settings.data.replay, prepared.dataset
    pools: dict[str, list[int]] = {}
    drawn: dict[str, list[int]] = {}
    if share:
        pools = replayable(
            {run: rows.train for run, rows in known.items()},
            [own.heldout, *(rows.heldout for rows in known.values())],
            max_tokens=settings.data.max_tokens,
        )
        drawn = draw(pools, round(share / (1 - share) * len(own.train)), seed=settings.training.seed)
    for run in drawn:
        if known[run].about.ends != own.about.ends:
            text = f"rows of {run} are replayed as it was trained on them, with another chat template"
            session.emit(Warned(text=text))
    parts = [
        EarlierPart(
            run=run,
            replayed=len(drawn.get(run, ())),
            replayable=len(pools.get(run, ())),
            heldout=len(rows.heldout),
        )
        for run, rows in known.items()
    ]
    audit = SupervisionAudit(settings.data.max_tokens)
    with PreparedWriter(place) as writer:
        for run, rows in known.items():
            for index in drawn.get(run, ()):
                example = _counted(rows.train[index])
                writer.add(TRAIN, example)
                audit.add(example, source=f"replayed from {run}")
            for index in range(len(rows.heldout)):
                writer.add(HELDOUT, rows.heldout[index])
        return writer.finish(AboutEarlier(asked=asked, parts=tuple(parts), audit=audit.summary()))


def replayable(
    trained: Mapping[str, ExampleTable], heldout: Sequence[ExampleTable], *, max_tokens: int
) -> dict[str, list[int]]:
    """Return which rows of each run may be replayed: those that no table of ``heldout`` has, each row once.

    Rows are told apart by their tokens. Longer ones than ``max_tokens`` are left out, for the memory is measured without them.
    """
    taken = {row for table in heldout for row, _ in table.keys()}  # noqa: SIM118 - no mapping
    pools: dict[str, list[int]] = {}
    for run, table in trained.items():
        pools[run] = []
        for index, (row, _) in enumerate(table.keys()):
            if row not in taken and table.num_tokens[index] <= max_tokens:
                taken.add(row)
                pools[run].append(index)
    return pools


def draw(pools: Mapping[str, Sequence[int]], count: int, *, seed: int) -> dict[str, list[int]]:
    """Return ``count`` rows of ``pools``, as many of each run as of the others; a run with few rows has each several times.

    Raises:
        DataError: There are none.
    """
    filled = [run for run, pool in pools.items() if pool]
    if not filled:
        raise DataError(
            "there are no rows to replay: the earlier runs held out all that they have, or their rows are longer than data.max_tokens",
            hint="leave --replay out, or raise --max-tokens",
        )
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, _STREAM])))
    drawn: dict[str, list[int]] = {}
    for place, run in enumerate(filled):
        size = count // len(filled) + (place < count % len(filled))
        order = random.permutation(len(pools[run]))
        drawn[run] = [pools[run][int(row)] for row in np.resize(order, size)]
    return drawn


def _counted(example: Example) -> Example:
    """Return ``example`` with the number of its trained turns, which a store does not keep."""
    if example.kind == "text":
        return example
    trained = example.loss_mask.astype(np.int8)
    return replace(example, num_trained_turns=int((np.diff(trained, prepend=0) == 1).sum()))


def _rows_of(one: Ancestor, settings: Settings, session: Session) -> PreparedDataset | None:
    """Return the rows of an earlier run; None where they are gone and nothing is to be replayed, which is said.

    Raises:
        DataError: They are to be replayed.
    """
    parent = Path(settings.run.root)
    folder = folder_of(one, beside=parent)
    found = None if folder is None else prepared_rows_of(folder)
    if found is not None:
        return found
    why = f"its folder {one.path} is gone"
    if folder is not None:
        try:
            again = _prepared_again(folder, session)
        except StoppedError:
            raise
        except SftError as error:
            why = f"they are not prepared any more, and cannot be prepared again: {error.message}"
        else:
            if again.fingerprint == folder.data_fingerprint() and (found := prepared_rows_of(folder)):
                return found
            why = "they are not prepared any more, and its sources are not what they were"
    if settings.data.replay:
        raise DataError(
            f"the rows of {one.run} cannot be replayed: {why}",
            hint="restore what is missing; or leave --replay out, which trains without them",
        )
    session.emit(Warned(text=f"what is lost of {one.run} is not measured: {why}"))
    return None


def _prepared_again(run: RunFolder, session: Session) -> PreparedDataset:
    """Prepare the rows of an earlier run from its settings."""

    def progress(event: Event, /) -> None:
        if isinstance(event, Progressed):
            session.emit(event)

    settings = read_settings(run)
    session.emit(Notice(text=f"preparing the rows of {run.name} again, which are no longer cached"))
    located = locate_base(settings.model, progress, run=run)
    return prepare_rows(
        settings,
        model_folder=tokenizer_folder(settings, located),
        session=Session(progress, session.stop),
        fallback=run.path / "cache",
    ).dataset
