"""The bridge to ``lm_eval``: its tasks, run on a model that is loaded here. Imported only where ``lm_eval`` is installed.

Files of tasks may name functions beside them, which ``lm_eval`` runs: a folder of tasks is a program.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from sftcli.errors import DataError, NetworkError, NotFoundError, SftError, StoppedError, first_line
from sftcli.events import Progressed, Session
from sftcli.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_FILTER = ",none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Results of a model: the numbers of each task by metric, and the number of questions."""

    numbers: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, int]


def find_tasks(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Return a task manager with all of ``names``, from the files in ``folder`` alone if they suffice.

    Raises:
        NotFoundError: There is no such folder, or no such task.
        DataError: A file of a task cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}", hint="name the folder of your task files")
    manager = _manager(folder, with_defaults=folder is None)
    if folder is not None and _missing(names, manager):
        manager = _manager(folder, with_defaults=True)  # takes seconds: it reads thousands of files
    missing = _missing(names, manager)
    if not missing:
        return manager
    raise NotFoundError(
        f"there is no task {missing[0]!r}",
        hint=did_you_mean(missing[0], manager.all_tasks)
        or "name one of lm_eval, or one of your own with --task-path DIR",
    )


def _manager(folder: Path | None, *, with_defaults: bool) -> TaskManager:
    try:
        return TaskManager(
            include_path=None if folder is None else [str(folder)], include_defaults=with_defaults
        )
    except Exception as error:
        raise DataError(f"the tasks in {folder} cannot be read: {first_line(error)}") from error


def _missing(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if name not in manager.all_tasks]


def run_harness(
    model: "PreTrainedModel",
    folder: Path,
    manager: TaskManager,
    names: Sequence[str],
    *,
    batch_rows: int,
    shots: int | None,
    most: int | None,
    session: Session,
) -> Asked:
    """Return the numbers of each task for ``model``, prompted with the chat template in ``folder``.

    Args:
        model: Loaded, in evaluation mode.
        folder: Of the model; its tokenizer and template are used.
        manager: Knows ``names``.
        names: Tasks, groups or tags.
        batch_rows: Requests run together.
        shots: Solved examples before each question; None leaves it to the task.
        most: Questions of each task; None for all.
        session: Told how far it is, and asked between batches whether to stop.

    Raises:
        NetworkError: The data of a task are not here and cannot be fetched.
        DataError: A task failed.
        StoppedError: A stop was asked for.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    datasets.disable_progress_bars()
    with _bars_as_events(session):
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_rows),
                tasks=list(names),
                num_fewshot=shots,
                limit=most,
                apply_chat_template=True,
                task_manager=manager,
                log_samples=False,
            )
        except SftError:
            raise
        except (ConnectionError, OSError) as error:
            raise NetworkError(
                f"the data of {', '.join(names)} cannot be fetched: {first_line(error)}",
                hint="fetch them on a connected machine, or name tasks whose data are files: --task-path DIR",
            ) from error
        except Exception as error:
            raise DataError(f"lm_eval could not run {', '.join(names)}: {first_line(error)}") from error
    results = found["results"]
    return Asked(
        numbers={task: _numbers(values) for task, values in results.items()},
        rows={task: int(values["sample_len"]) for task, values in results.items() if "sample_len" in values},
    )


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {
        name.removesuffix(_NO_FILTER): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name not in {"sample_len"}
    }


@contextmanager
def _bars_as_events(session: Session) -> Iterator[None]:
    """Report what lm_eval would draw as bars; the only place between its batches where a stop can be noticed."""

    class Bar:
        def __init__(
            self, items: Iterable[object] = (), *, total: int = 0, desc: str = "", **_options: object
        ) -> None:
            self.items, self.total, self.desc, self.done = items, total, desc.lower(), 0

        def __iter__(self) -> Iterator[object]:
            for item in self.items:
                yield item
                self.update(1)

        def update(self, count: int = 1) -> None:
            if session.stop.requested():
                raise StoppedError
            self.done += count
            session.emit(
                Progressed(task=self.desc or "asking", done=self.done, total=self.total, unit="requests")
            )

        def close(self) -> None:
            if self.done < self.total:  # requests that share a context are answered at once
                self.update(self.total - self.done)

    modules = [vars(module) for module in (lm_eval.api.task, lm_eval.models.huggingface)]
    theirs = [names["tqdm"] for names in modules]
    for names in modules:
        names["tqdm"] = Bar
    try:
        yield
    finally:
        for names, bar in zip(modules, theirs, strict=True):
            names["tqdm"] = bar
