"""``sft eval``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options import data as data_options
from sftcli.cli.options import shared as options
from sftcli.cli.results import results
from sftcli.cli.session.processes import is_one_of_several, start_several
from sftcli.cli.session.session import LOADING, session
from sftcli.cli.terminal import tables
from sftcli.errors import UsageError
from sftcli.extras import require_package

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftcli.services.evaluate.limits import Limit
    from sftcli.services.evaluate.tasks import TasksReport


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Run, checkpoint, folder or model name; the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    trust_remote_code: options.TrustRunCode = False,
    data: options.Data = None,
    ignored: data_options.Ignore = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            autocompletion=complete.models,
            help="Model to compare with; the one the run started from.",
        ),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Compare with no other model.")] = False,
    max_rows: Annotated[
        int, typer.Option("--max-rows", metavar="N", min=1, help="Most rows to answer by generation.")
    ] = 200,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Rows scored at once; numbers do not depend on it."
        ),
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above", metavar="METRIC=VALUE", help="Exit with 3 if the number is larger. Repeatable."
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under", metavar="METRIC=VALUE", help="Exit with 3 if the number is smaller. Repeatable."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="NAME[,NAME]", help="Ask these tasks of lm_eval instead of the held-out rows."
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(
            "--task-path", metavar="DIR", help="Folder of task files of your own; they may hold code."
        ),
    ] = None,
    task_rows: Annotated[
        int | None, typer.Option("--task-rows", metavar="N", min=1, help="Most questions of each task.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", metavar="N", min=0, help="Solved examples before each question of a task."),
    ] = None,
    processes: options.EvalProcesses = 1,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Score a model on its held-out rows beside the model it started from: loss, answers, repetition, copying.

    Examples:
      sft eval

      sft eval my-run --data test.jsonl --no-base

      sft eval --fail-above loss=1.0 --fail-under match_fraction=0.5

      sft eval --tasks arc_easy --task-rows 100 --fail-under arc_easy/acc=0.5
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    from sftcli.services.evaluate.limits import check_limits, read_limits, require_measurable

    limits = read_limits(fail_above or (), fail_under or ())
    if tasks is not None:
        if processes > 1:
            raise UsageError("--tasks and --processes exclude each other", hint="lm_eval asks in one process")
        if data:
            raise UsageError("--tasks and --data exclude each other", hint="run sft eval once for each")
        require_package("lm_eval", extra="eval", needed_by="--tasks", package="lm-eval")
        with session(output) as current:
            current.emit(LOADING)
            from sftcli.services.evaluate.tasks import TasksRequest, run_tasks

            asked = run_tasks(
                TasksRequest(
                    checkpoint=checkpoint,
                    names=tuple(name.strip() for name in tasks.split(",") if name.strip()),
                    task_path=task_path,
                    base=base,
                    with_base=not no_base,
                    shots=shots,
                    most=task_rows,
                    batch_size=batch_size,
                    root=runs,
                    tokenizer=tokenizer,
                    base_model=base_model,
                    trusts_code=trust_remote_code,
                ),
                current,
            )
        _show_tasks(asked, limits, output)
        return
    if task_path is not None or task_rows is not None or shots is not None:
        raise UsageError(
            "--task-path, --task-rows and --shots go with --tasks", hint="name tasks: --tasks NAME"
        )
    require_measurable(limits)
    if processes > 1 and not is_one_of_several():
        raise typer.Exit(start_several(processes, output))
    with session(output) as current:
        current.emit(LOADING)
        from sftcli.services.evaluate.evaluate import EvalRequest, run_evaluation

        request = EvalRequest(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            base_model=base_model,
            data=tuple(data or ()),
            ignored=tuple(ignored or ()),
            base=base,
            with_base=not no_base,
            max_rows=max_rows,
            root=runs,
            batch_size=batch_size,
            trusts_code=trust_remote_code,
        )
        report = run_evaluation(request, current)
    if not output.json:
        results.show_scores(report, output)
    check_limits(report.numbers(), limits)  # first, for --json prints one object, also on failure
    if output.json:
        tables.show_result_json(report.to_json())


def _show_tasks(report: "TasksReport", limits: "Sequence[Limit]", output: options.Output) -> None:
    from sftcli.services.evaluate.limits import check_limits

    if not output.json:
        results.show_tasks(report, output)
    check_limits(report.numbers(), limits)
    if output.json:
        tables.show_result_json(asdict(report))
