"""A run's folder: the only place that knows the names of files inside it.

runs/NAME/
  run.json          what was started: version, command, time, and each resume
  config.toml       the resolved settings; alone they reproduce the run
  origins.json      where each setting came from
  data.json         what was prepared: fingerprint and audit
  events.jsonl      every event, one JSON object a line
  training.log      the same story for people
  checkpoints/      full states
  final/            the tuned model, a Hugging Face folder, or an adapter, a folder of peft
  eval.json         scores on the held-out rows, once `eval` has run
  report.html       all of it on one page
  trackers/         what trackers keep, where the run has some
"""

import dataclasses
import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sftcli import storage
from sftcli.config.schema import RunSettings
from sftcli.errors import NotFoundError, OutputError, ResourceError, SftError, UsageError
from sftcli.events import EventSink, Notice
from sftcli.suggest import did_you_mean
from sftcli.training.checkpoint_names import ASIDE, TAKEN_BACK


@dataclasses.dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def about(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        """``config.toml``."""
        return self.path / "config.toml"

    @property
    def origins(self) -> Path:
        """``origins.json``."""
        return self.path / "origins.json"

    @property
    def data(self) -> Path:
        """``data.json``."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the tuned model."""
        return self.path / "final"

    @property
    def evaluation(self) -> Path:
        """``eval.json``."""
        return self.path / "eval.json"

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
    def results_set_aside(self) -> dict[Path, Path]:
        """What says how a run has ended, and where it is kept while the run was taken back and has not ended again."""
        return {path: path.with_name(ASIDE + path.name) for path in (self.final, self.evaluation)}

    def read_about(self) -> dict[str, object]:
        """Return what ``run.json`` holds."""
        about = json.loads(self.about.read_text(encoding="utf-8"))
        assert isinstance(about, dict)
        return about

    def read_events(self) -> list[dict[str, object]]:
        """Return the events logged so far; a line torn by a crash is left out."""
        return list(self.iterate_events())

    def iterate_events(self) -> Iterator[dict[str, object]]:
        """Yield the events logged so far, none where there is no log yet; a line torn by a crash is left out."""
        try:
            file = (self.path / "events.jsonl").open(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event


def create_run(settings: RunSettings, *, label: str) -> RunFolder:
    """Make the folder of a new run, named ``settings.name`` or after ``label`` and the time.

    Raises:
        OutputError: The name is taken, or the folder cannot be made.
    """
    root = Path(settings.root)
    stamp = datetime.now(tz=UTC).strftime("%Y%m%d-%H%M%S")
    try:
        storage.make_folders(root)
    except OSError as error:
        raise _cannot_create(root, error) from error
    try:
        if settings.name is not None:
            storage.disk.make_folder(root / settings.name)
            return RunFolder(root / settings.name)
        for attempt in range(1, 100):
            folder = root / (f"{label}-{stamp}" if attempt == 1 else f"{label}-{stamp}-{attempt}")
            try:
                storage.disk.make_folder(folder)
            except FileExistsError:
                continue
            return RunFolder(folder)
    except FileExistsError as error:
        if settings.name is not None and (root / settings.name / "run.json").is_file():
            run = RunFolder(root / settings.name)
            hint = "choose another name with --run"
            if not run.is_finished:
                hint = f"go on with it: sft resume {settings.name}, or {hint}"
        else:
            hint = "choose another name with --run"
        raise OutputError(f"{error.filename} exists already", hint=hint) from error
    except OSError as error:
        raise _cannot_create(root, error) from error
    raise OutputError(f"no free name for a run under {root}", hint="pass --run NAME")


def _cannot_create(root: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot create the run folder under {root}: {error.filename}: {error.strerror}",
        hint="choose another --set run.root=DIR",
    )


def is_unstarted(settings: RunSettings) -> bool:
    """Return whether the run called ``settings.name`` is there and came to an end before its first step.

    A wrong file name does that. The name is then still free for the command that is right.
    """
    if settings.name is None:
        return False
    run = RunFolder(Path(settings.root) / settings.name)
    return run.about.is_file() and not _has_begun(run, {"StepDone", "FitEnded"})


def _has_begun(run: RunFolder, signs: Container[object]) -> bool:
    return run.checkpoints.exists() or any(event.get("event") in signs for event in run.iterate_events())


@contextmanager
def forgotten_if_unstarted(run: RunFolder, emit: EventSink, *, is_new: bool) -> Iterator[None]:
    """Remove the folder of a run that the block ends with an error before its first step, where nobody will ask for it.

    That is a run that the block began (``is_new``), and not one that ran out of memory: that can be resumed elsewhere.
    """
    try:
        yield
    except ResourceError:
        raise
    except SftError:
        if is_new and not _has_begun(run, {"StepDone"}):
            storage.try_remove_tree(run.path)
            emit(Notice(text=f"{run.path} is removed: the run ended before its first step"))
        raise


def existing_run(settings: RunSettings) -> RunFolder | None:
    """Return the run called ``settings.name`` where it is there, even if it was killed before anything was in it.

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
    return path.name in {"config.toml", "origins.json"} or path.name.startswith((".lock", storage.TEMPORARY))


def list_runs(root: Path) -> list[RunFolder]:
    """Return the runs under ``root``, newest first by the time written in them."""
    runs = [RunFolder(path.parent) for path in root.glob("*/run.json")]
    return sorted(runs, key=lambda run: (str(run.read_about().get("started_at", "")), run.name), reverse=True)


def find_run(name: str, root: Path) -> RunFolder:
    """Return the run called ``name`` under ``root``, or the run folder at the path ``name``.

    Raises:
        NotFoundError: There is none; names the nearest.
    """
    for path in (root / name, Path(name)):
        if (path / "run.json").is_file():
            return RunFolder(path)
    names = [run.name for run in list_runs(root)]
    known = f"runs there: {', '.join(names[:12])}" if names else f"there are no runs under {root} yet"
    raise NotFoundError(f"no run {name!r} under {root}", hint=did_you_mean(name, names) or known)


def newest_run(root: Path, *, finished: bool | None = None) -> RunFolder:
    """Return the newest run, of those that are finished or not where ``finished`` says so.

    Raises:
        NotFoundError: There is none.
    """
    for run in list_runs(root):
        if finished is None or run.is_finished == finished:
            return run
    if finished:
        raise NotFoundError(f"no finished run under {root}", hint="train one first: sft train")
    raise NotFoundError(f"no unfinished run under {root}", hint="start one: sft train")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all."""
    storage.replace_file(path, text.encode("utf-8"))
