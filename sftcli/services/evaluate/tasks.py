"""Run ``lm_eval`` tasks on a model and its base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import UsageError
from sftcli.events import Notice, Session
from sftcli.services.evaluate.evaluate import base_to_compare, model_of
from sftcli.services.models.choose import ModelChoice, load_for_inference

BATCH_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRequest:
    """Which tasks of which model; ``checkpoint``, ``base`` and ``with_base`` as in ``EvalRequest``.

    ``task_path`` is a folder of task files to look in first. ``shots`` None leaves the examples to each task, ``most`` None
    asks all of its questions.
    """

    checkpoint: str | None
    names: tuple[str, ...]
    task_path: Path | None
    base: str | None
    with_base: bool
    shots: int | None
    most: int | None
    batch_size: int | None
    root: Path
    tokenizer: str | None = None  # of a .pt file
    trusts_code: bool = False  # that of the run, and of the model it started from
    base_model: str | None = None  # of an adapter, where its base is not where it says
    precision: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksReport:
    """Numbers of each task by metric, as ``lm_eval`` names them."""

    model: str
    tasks: Mapping[str, Mapping[str, float]]
    base_model: str | None
    base_tasks: Mapping[str, Mapping[str, float]]
    task_rows: Mapping[str, int]  # questions of each task that were asked

    def numbers(self) -> dict[str, float]:
        """Return the model's numbers, each under ``TASK/METRIC``."""
        return {
            f"{task}/{metric}": value
            for task, values in self.tasks.items()
            for metric, value in values.items()
        }


def run_tasks(request: TasksRequest, session: Session) -> TasksReport:
    """Run the tasks with the chat template the model was trained with.

    Raises:
        UsageError: No task was named.
        NotFoundError, NetworkError, DataError: A task, its data or the model is not there, or is damaged.
        StoppedError: A stop was asked for.
    """
    if not request.names:
        raise UsageError("--tasks names no task", hint="such as --tasks arc_easy,gsm8k")
    emit = session.emit
    choice = model_of(request, emit)
    base = base_to_compare(choice, request, emit)
    emit(Notice(text="loading lm_eval"))
    from sftcli.services.evaluate.lm_eval_bridge import Asked, find_tasks, run_harness

    manager = find_tasks(request.names, request.task_path)

    def ask(one: ModelChoice) -> Asked:
        model = load_for_inference(one, precision=request.precision, emit=emit)
        return run_harness(
            model,
            one.folder,
            manager,
            request.names,
            batch_rows=request.batch_size or BATCH_ROWS,
            shots=request.shots,
            most=request.most,
            session=session,
        )

    of_base = None if base is None else ask(base)
    asked = ask(choice)
    return TasksReport(
        model=choice.name,
        tasks=asked.numbers,
        base_model=None if base is None else base.name,
        base_tasks={} if of_base is None else of_base.numbers,
        task_rows=asked.rows,
    )
