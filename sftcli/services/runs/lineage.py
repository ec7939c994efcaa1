"""The runs that a run trains on from: the one that made its model, the one before that, and so on. Needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sftcli.config.schema.settings import Settings
from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.json_files import json_text, read_json_or_nothing, replace_json
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.paths import as_path
from sftcli.services.runs.folder import RunFolder, owner_of, read_settings

KEY = "lineage"  # in run.json
MARK = "sft_run.json"  # in an exported model folder: the name of its run, and the hash of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """An earlier run as ``run.json`` of a later one has it: its name, where it was, and the hash of its rows."""

    run: str
    path: str
    data: str | None

    @classmethod
    def of(cls, run: RunFolder) -> "Ancestor":
        """Return what is recorded of ``run``."""
        return cls(run=run.name, path=str(run.path.absolute()), data=run.data_fingerprint())

    def folder(self, beside: Path) -> RunFolder | None:
        """Return its folder, also where it was moved together with its successor to ``beside``; None where it is gone."""
        for path in (Path(self.path), beside / self.run):
            run = RunFolder(path)
            if run.about.is_file() and run.data_fingerprint() == self.data:
                return run
        return None


def lineage_of(settings: Settings) -> tuple[Ancestor, ...]:
    """Return the runs behind the model that ``settings`` start from, the nearest first; none where no run has made it."""
    parent = parent_of(settings)
    if parent is None:
        return ()
    folder = parent.folder(beside=Path(settings.run.root))
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
        return Ancestor.of(owner)
    marked = read_json_or_nothing(folder / MARK) if folder.is_dir() else {}
    name, data = marked.get("run"), marked.get("data")
    if not isinstance(name, str) or not isinstance(data, str):
        return None
    name = Path(name).name  # a file from elsewhere leads nowhere else
    return Ancestor(run=name, path=str((Path(settings.run.root) / name).absolute()), data=data)


def mark_of(run: RunFolder) -> str:
    """Return the text of the file by which an exported model is known as one of ``run``."""
    return json_text({"run": run.name, "data": run.data_fingerprint()})


def recorded_lineage(run: RunFolder) -> tuple[Ancestor, ...] | None:
    """Return what ``run.json`` says; None where it was written before there was such a key, or the run has not got so far."""
    found = read_json_or_nothing(run.about).get(KEY)
    return tuple(_read(found)) if isinstance(found, list) else None


def record_lineage(run: RunFolder, lineage: tuple[Ancestor, ...]) -> None:
    """Write into ``run.json`` which runs ``run`` trains on from."""
    replace_json(run.about, run.read_about() | {KEY: [asdict(one) for one in lineage]})


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


def _before(run: RunFolder) -> tuple[Ancestor, ...]:
    recorded = recorded_lineage(run)
    if recorded is not None:
        return recorded
    try:
        return lineage_of(read_settings(run))
    except (UsageError, NotFoundError, DataError):
        return ()


def _read(found: list[object]) -> Iterator[Ancestor]:
    for entry in found:
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            data = entry.get("data")
            yield Ancestor(
                run=str(entry.get("run", "")),
                path=entry["path"],
                data=data if isinstance(data, str) else None,
            )
