"""A run's folder: the only place that knows the names of files inside it.

runs/NAME/
  run.json          what was started: version, command, time, and each resume
  config.toml       the resolved settings; alone they reproduce the run
  origins.json      where each setting came from
  data.json         what was prepared: fingerprint and audit
  earlier/          rows of the runs that it trains on from: those that are replayed, and those that these held out
  events.jsonl      every event, one JSON object a line
  training.log      the same story for people
  checkpoints/      full states
  final/            the tuned model, a Hugging Face folder, or an adapter, a folder of peft
  eval.json         scores on the held-out rows, once `eval` has run
  report.html       all of it on one page
  trackers/         what trackers keep, where the run has some
"""

import dataclasses
import errno
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from sftcli import storage
from sftcli.config.layers import Override
from sftcli.config.resolve import Resolved, resolve
from sftcli.config.schema.run import RunSettings
from sftcli.config.schema.settings import Settings
from sftcli.data.prepared.about import RUN_ROWS, RunRows
from sftcli.errors import (
    NotFoundError,
    OutputError,
    SftError,
    UsageError,
)
from sftcli.own_files import OwnFile
from sftcli.paths import as_path
from sftcli.services.runs.record import RECORD, RunRecord
from sftcli.suggest import did_you_mean
from sftcli.training.checkpoint.names import ASIDE, TAKEN_BACK

LENGTH = ("training.max_steps", "training.epochs")  # either says where a run ends
DEFAULT_ROOT = Path("runs")  # where commands look for a run that is named
_OTHER_ROOT = "choose another --set run.root=DIR"


SETTING_ORIGINS = OwnFile(
    form=dict[str, str], hint="delete it: it says where settings came from, and nothing depends on that"
)


@dataclasses.dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    CONFIG: ClassVar = "config.toml"
    ORIGINS: ClassVar = "origins.json"
    ABOUT: ClassVar = "run.json"

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def argument(self) -> str:
        """The argument that names the run in a command typed in the current folder, quoted for a shell."""
        by_name = DEFAULT_ROOT / self.name
        word = self.name if self.path.absolute() == by_name.absolute() else str(self.path)
        return shlex.quote(f"./{word}" if word.startswith("-") else word)

    @property
    def about(self) -> Path:
        """``run.json``."""
        return self.path / self.ABOUT

    @property
    def config(self) -> Path:
        """``config.toml``."""
        return self.path / self.CONFIG

    @property
    def origins(self) -> Path:
        """``origins.json``."""
        return self.path / self.ORIGINS

    @property
    def data(self) -> Path:
        """``data.json``."""
        return self.path / "data.json"

    @property
    def earlier(self) -> Path:
        """Folder of the rows of earlier runs."""
        return self.path / "earlier"

    @property
    def events(self) -> Path:
        """``events.jsonl``."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the tuned model."""
        return self.path / "final"

    def inside(self, folder: Path) -> str:
        """Return what a model's folder is called in the run, such as ``final``."""
        return folder.resolve().relative_to(self.path.resolve()).as_posix()

    @property
    def evaluation(self) -> Path:
        """``eval.json``."""
        return self.path / "eval.json"

    @property
    def ledger(self) -> Path:
        """``rows.json``."""
        return self.path / "rows.json"

    @property
    def report(self) -> Path:
        """``report.html``."""
        return self.path / "report.html"

    @property
    def trackers(self) -> Path:
        """Folder of what trackers keep."""
        return self.path / "trackers"

    @property
    def is_finished(self) -> bool:
        """Whether the tuned model is there, and the run was not taken back to an earlier checkpoint since."""
        if (self.checkpoints / TAKEN_BACK).exists():
            return False
        return any((self.final / name).is_file() for name in ("config.json", "adapter_config.json"))

    @property
    def has_lost_weights(self) -> bool:
        """Whether its weights were removed after a comparison had scored it."""
        return not self.is_finished and self.about.is_file() and self.record().weights_removed

    def require_weights(self) -> None:
        """Make sure that its weights were not removed.

        Raises:
            NotFoundError: They were.
        """
        if self.has_lost_weights:
            raise NotFoundError(
                f"run {self.name} is one of a comparison: its weights were removed when it was scored",
                hint=f"to train it with weights that stay: sft train --config {shlex.quote(str(self.config))} --run NAME",
            )

    @property
    def results_set_aside(self) -> dict[Path, Path]:
        """Files with the outcome of a run, and where they are kept while a rewound run has not ended again."""
        return {
            path: path.with_name(ASIDE + path.name) for path in (self.final, self.evaluation, self.ledger)
        }

    def record(self) -> RunRecord:
        """Return what ``run.json`` says.

        Raises:
            NotFoundError: There is none.
            DataError: It is damaged.
        """
        return RECORD.read(self.about)

    def note(self, **changes: object) -> None:
        """Write ``changes`` of the record into ``run.json``.

        Raises:
            NotFoundError, DataError: As ``record``.
        """
        RECORD.write(self.about, dataclasses.replace(self.record(), **changes))  # type: ignore[arg-type]

    @property
    def is_damaged(self) -> bool:
        """Whether ``run.json`` cannot be read."""
        return RECORD.find_whole(self.about) is None

    def rows(self) -> RunRows | None:
        """Return what is known of the rows that were prepared for the run; None where it has not got so far.

        Raises:
            DataError: ``data.json`` is damaged.
        """
        return RUN_ROWS.find(self.data)

    def data_fingerprint(self) -> str | None:
        """Return the hash of the rows that were prepared for the run; None where that is not known.

        Raises:
            DataError: ``data.json`` is damaged.
        """
        rows = self.rows()
        return None if rows is None else rows.fingerprint or None

    def first_origins(self) -> Mapping[str, str]:
        """Return where each setting came from at the start of the run; nothing where the run does not tell.

        Raises:
            DataError: ``origins.json`` is damaged.
        """
        return SETTING_ORIGINS.find(self.origins) or {}


def create_run(settings: RunSettings, *, label: str, files: Mapping[str, str]) -> RunFolder:
    """Make the folder of a new run, named ``settings.name`` or after ``label`` and the time, with ``files`` in it from the start.

    Raises:
        OutputError: The name is taken, or the folder cannot be made.
        StorageError: The disk is full.
    """
    root = Path(settings.root)
    staging = storage.scratch_path(root, storage.TEMPORARY)
    try:
        storage.make_folders(root)
        storage.sweep(root)
        storage.disk.make_folder(staging)
        for name, text in files.items():
            storage.write_file(staging / name, [text.encode("utf-8")])
        storage.disk.sync(staging)
        for path in _candidates(root, settings.name, label):
            if _is_free(path) and _renamed(staging, path):
                storage.disk.sync(root)
                return RunFolder(path)
    except OSError as error:
        raise _cannot_create(root, error) from error
    finally:
        if staging.exists():
            storage.try_remove_tree(staging)
    if settings.name is None:
        raise OutputError(f"no free name for a run under {root}", hint="pass --run NAME")
    raise _taken(RunFolder(root / settings.name))


def require_free(settings: RunSettings) -> None:
    """Make sure that a run of ``settings`` can be made, before what it needs is loaded.

    Raises:
        OutputError: Its name is taken, or its folder cannot be made.
    """
    root = Path(settings.root)
    storage.require_place(root / (settings.name or "run"), hint=_OTHER_ROOT)
    if settings.name is not None and not _is_free(root / settings.name):
        raise _taken(RunFolder(root / settings.name))


def _taken(run: RunFolder) -> OutputError:
    hint = "choose another name with --run"
    if run.about.is_file() and not run.is_finished:
        hint = f"resume it: sft resume {run.argument}, or {hint}"
    return OutputError(f"{run.path} exists already", hint=hint)


def _candidates(root: Path, name: str | None, label: str) -> Iterator[Path]:
    if name is not None:
        yield root / name
        return
    stamp = datetime.now(tz=UTC).strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 100):
        yield root / (f"{label}-{stamp}" if attempt == 1 else f"{label}-{stamp}-{attempt}")


def _is_free(path: Path) -> bool:
    """Return whether nothing is there, or an empty folder, as a start that was killed at once left one."""
    return not path.is_symlink() and (not path.exists() or (path.is_dir() and not any(path.iterdir())))


def _renamed(staging: Path, path: Path) -> bool:
    """Give the folder its name, unless another process was faster."""
    try:
        storage.disk.rename(staging, path)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            return False
        raise
    return True


def _cannot_create(root: Path, error: OSError) -> SftError:
    return storage.disk_error(error, root, _OTHER_ROOT)


def existing_run(settings: RunSettings) -> RunFolder | None:
    """Return the run called ``settings.name`` if its folder exists, even an empty one of a killed start.

    Raises:
        UsageError: The settings give no name.
        OutputError: A folder of that name is no run.
    """
    if settings.name is None:
        raise UsageError("--resume auto needs to know which run", hint="name it: --run NAME")
    path = Path(settings.root) / settings.name
    if not path.exists():
        return None
    strange = (
        []
        if (path / "run.json").is_file()
        else [child.name for child in path.iterdir() if not _is_ours(child)]
    )
    if strange:
        raise OutputError(
            f"{path} exists and is not a run: it holds {strange[0]}", hint="choose another --run NAME"
        )
    return RunFolder(path)


def _is_ours(path: Path) -> bool:
    former = {f".tmp-{name}" for name in ("config.toml", "origins.json", "run.json", ".lock")}
    is_scratch = storage.scratch_label(path.name, storage.TEMPORARY) is not None
    return (
        path.name in {"config.toml", "origins.json", *former} or is_scratch or path.name.startswith(".lock")
    )


def list_runs(root: Path) -> list[RunFolder]:
    """Return the runs under ``root``, newest first by the time written in them; those that are damaged come last."""
    runs = [
        RunFolder(path.parent) for path in root.glob("[!.]*/run.json")
    ]  # those of killed starts have no name yet
    return sorted(runs, key=lambda run: (_started_at(run), run.name), reverse=True)


def _started_at(run: RunFolder) -> str:
    found = RECORD.find_whole(run.about)
    return "" if found is None else found.started_at


def find_run(name: str, root: Path) -> RunFolder:
    """Return the run called ``name`` under ``root``, or the run folder at the path ``name``.

    Raises:
        NotFoundError: There is none; names the nearest.
    """
    places = (root / name, as_path(name))
    for path in places:
        if (path / "run.json").is_file():
            return RunFolder(path)
    if (root / name).is_dir() and all(map(_is_ours, (root / name).iterdir())):
        raise _not_begun(RunFolder(root / name))
    for path in places:
        if path != root and list_runs(path):
            raise NotFoundError(
                f"{path} is a folder of runs, not one run",
                hint=f"its runs: sft runs {shlex.quote(str(path))}",
            )
    names = [run.name for run in list_runs(root)]
    known = f"runs there: {', '.join(names[:12])}" if names else f"there are no runs under {root} yet"
    raise NotFoundError(f"no run {name!r} under {root}", hint=did_you_mean(name, names) or known)


def refuse_run(folder: Path, root: Path) -> None:
    """Make sure that ``folder`` is one of runs, and not one run, by its path or by its name under ``root``.

    Raises:
        UsageError: It is one run.
    """
    for path in (folder, *(() if folder.exists() else (root / folder,))):
        if (path / RunFolder.ABOUT).is_file():
            at = "" if path == folder or root == DEFAULT_ROOT else f" --runs {shlex.quote(str(root))}"
            raise UsageError(
                f"{folder} is one run, not a folder of runs",
                hint=f"one run: sft show {shlex.quote(str(folder))}{at}",
            )


def _not_begun(run: RunFolder) -> NotFoundError:
    """Return the error of a folder that a start left which was killed before it wrote what it was."""
    name = f"--run {shlex.quote(run.name)} --resume auto"
    settings = (
        f"--config {shlex.quote(str(run.config))} {name}"
        if run.config.is_file()
        else f"{name} --set run.root={shlex.quote(str(run.path.parent))}, with the flags that it was given"
    )
    return NotFoundError(
        f"the run {run.path} was killed before its settings were saved",
        hint=f"start it again: sft train {settings}",
    )


def owner_of(path: Path) -> RunFolder | None:
    """Return the run that a model folder lies in: RUN/final or RUN/checkpoints/STEP."""
    for parent in list(path.resolve().parents)[:2]:
        if (parent / "run.json").is_file():
            return RunFolder(parent)
    return None


def newest_run(root: Path, *, finished: bool | None = None) -> RunFolder:
    """Return the newest run, only of finished or unfinished ones if ``finished`` is set.

    Raises:
        NotFoundError: There is none.
    """
    for run in list_runs(root):
        if (
            (finished is None or run.is_finished == finished)
            and not run.is_damaged
            and not run.has_lost_weights
        ):
            return run
    kind = {None: "run", True: "finished run", False: "unfinished run"}[finished]
    raise NotFoundError(f"there is no {kind} under {root}", hint="start one: sft train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run, the settings it ``has`` since its last start, and these with the user's changes."""

    run: RunFolder
    has: Settings
    settings: Settings
    accepted: tuple[str, ...] = ()  # keys that an earlier start has changed, and this one does not


def find_recorded(
    name: str | None, root: Path, overrides: Sequence[Override], *, finished: bool | None = False
) -> Recorded:
    """Return the run called ``name``, or the newest under ``root`` of those that are unfinished, or that ``finished`` says.

    Raises:
        NotFoundError: There is none.
    """
    run = newest_run(root, finished=finished) if name is None else find_run(name, root)
    run.require_weights()
    if not run.config.is_file():
        raise NotFoundError(
            f"{run.path} lacks {run.config.name}, the settings that it was started with",
            hint=f"start it again under another name; its command was: {run.record().command}",
        )
    return Recorded(
        run=run,
        has=read_settings(run),
        settings=read_settings(run, overrides),
        accepted=tuple(override.key for override in _changed(run, overrides)),
    )


def read_settings(run: RunFolder, overrides: Sequence[Override] = ()) -> Settings:
    """Return the settings that ``run`` has since its last start, changed by ``overrides``."""
    return resolve_run(run, overrides).settings


def resolve_run(run: RunFolder, overrides: Sequence[Override] = ()) -> Resolved:
    """Return the settings that ``run`` has since its last start, changed by ``overrides``, with their origins."""
    overrides = (*_changed(run, overrides), *overrides)
    return resolve(preset=None, config_file=run.config, overrides=overrides, environ={})


def _changed(run: RunFolder, overrides: Sequence[Override]) -> list[Override]:
    """Return what later starts have changed of the settings of ``run``, unless ``overrides`` change it again."""
    found = run.record().changed if run.about.is_file() else {}
    again = {override.key for override in overrides}
    again |= set(LENGTH) if again & set(LENGTH) else set()
    return [
        Override(key=key, value=value, origin=run.ABOUT) for key, value in found.items() if key not in again
    ]
