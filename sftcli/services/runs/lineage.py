"""The runs that a run trains on from: the one that made its model, the one before that, and so on. Needs no torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.settings import Settings
from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.own_files import OwnFile
from sftcli.paths import PathText, as_path
from sftcli.services.runs.folder import RunFolder, owner_of, read_settings
from sftcli.services.runs.record import Ancestor

MARK = "sft_run.json"  # in an exported model folder: the name of its run, and the hash of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What an exported model folder says about the run that it is of: its name, and the hash of its rows."""

    run: PathText
    data: str | None = None


MARKS = OwnFile(
    form=Mark,
    hint="export the model again: sft export RUN --to hf; or delete that file, and the folder is a model like any other",
)


def folder_of(one: Ancestor, beside: Path) -> RunFolder | None:
    """Return the folder of a run, also where it was moved together with its successor to ``beside``; None where it is gone."""
    for path in (Path(one.path), beside / one.run):
        run = RunFolder(path)
        if run.about.is_file() and run.data_fingerprint() == one.data:
            return run
    return None


def lineage_of(settings: Settings) -> tuple[Ancestor, ...]:
    """Return the runs behind the model that ``settings`` start from, the nearest first; none where no run has made it."""
    parent = parent_of(settings)
    if parent is None:
        return ()
    folder = folder_of(parent, beside=Path(settings.run.root))
    return (parent, *(() if folder is None else _before(folder)))


def names_of(lineage: Sequence[Ancestor]) -> dict[Ancestor, str]:
    """Return what each run is called: its name, or its path where another one has the same name."""
    names = [one.run for one in lineage]
    return {one: one.run if names.count(one.run) == 1 else one.path for one in lineage}


def parent_of(settings: Settings) -> Ancestor | None:
    """Return the run that made the model, or the adapter, that ``settings`` start from.

    It is the run that the folder lies in; or of a folder that was exported, the one that it names, which is looked for in ``run.root``.
    """
    start = settings.adapter.start_from
    if start is None and settings.model.name == ALIAS:
        return None
    folder = as_path(settings.model.name if start is None else start)
    owner = owner_of(folder)
    if owner is not None:
        with _known_of(owner):
            return Ancestor(run=owner.name, path=str(owner.path.absolute()), data=owner.data_fingerprint())
    mark = MARKS.find(folder / MARK) if folder.is_dir() else None
    if mark is None or mark.data is None:
        return None
    name = Path(mark.run).name  # a file from elsewhere leads nowhere else
    return Ancestor(run=name, path=str((Path(settings.run.root) / name).absolute()), data=mark.data)


def mark_of(run: RunFolder) -> str:
    """Return the text of the file by which an exported model is known as one of ``run``."""
    return MARKS.text(Mark(run=run.name, data=run.data_fingerprint()))


def require_earlier(settings: Settings) -> None:
    """Make sure that there are rows to replay where ``settings`` ask for some.

    Raises:
        UsageError: No run has made the model, or the order of rows is one that replayed rows have no place in.
    """
    if not settings.data.replay:
        return
    if parent_of(settings) is None:
        raise UsageError(
            f"data.replay is {settings.data.replay:g}, and {settings.model.name} is not the model of a run, so that there are "
            "no rows of an earlier run",
            hint="name the run: --model RUN; or leave --replay out",
        )
    if settings.data.score_column is not None:
        raise UsageError(
            "data.replay and data.order=score exclude each other: replayed rows have no score among the others",
            hint="leave one of them out",
        )


@contextmanager
def _known_of(run: RunFolder) -> Iterator[None]:
    """Let an error about the files of ``run`` say how to train on without them."""
    try:
        yield
    except DataError as error:
        raise DataError(
            error.message,
            hint=f"to train on without knowing which rows it and those before it have seen or held out, copy the model's folder "
            f"out of {run.path.absolute()} and name the copy",
            location=error.location,
        ) from error


def _before(run: RunFolder) -> tuple[Ancestor, ...]:
    with _known_of(run):
        recorded = run.record().lineage
    if recorded is not None:
        return recorded
    try:
        return lineage_of(read_settings(run))
    except (UsageError, NotFoundError, DataError):
        return ()
