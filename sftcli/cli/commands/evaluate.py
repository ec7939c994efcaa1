"""``sft eval``."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import FLAGS, PrecisionChoice
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import ModelFlags, Output, Processes, RunsRoot
from sftcli.cli.results import results
from sftcli.cli.results.checks import show_checks
from sftcli.cli.results.trial import show_tried
from sftcli.cli.session.processes import is_first, is_one_of_several, start_several
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.errors import ThresholdError, UsageError
from sftcli.extras import require_package

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftcli.services.evaluate.against import Against
    from sftcli.services.evaluate.evaluate import EvalReport
    from sftcli.services.evaluate.limits import Limit
    from sftcli.services.evaluate.request import EvalRequest
    from sftcli.services.evaluate.tasks import TasksReport
    from sftcli.services.evaluate.texts import TextReport

DEFAULT_SHOTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredFlags:
    """What is scored, and beside what."""

    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Run, checkpoint, folder or model name; by default the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None
    model: ModelFlags
    data: Annotated[list[str] | None, FLAGS["--data"].option] = None
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="Score the perplexity of plain text instead of rows. Repeatable."
        ),
    ] = None
    ignored: Annotated[list[str] | None, FLAGS["--ignore"].option] = None
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            autocompletion=complete.models,
            help="Model to compare with; by default the run's base model.",
        ),
    ] = None
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not compare with a base model.")] = False
    max_rows: Annotated[
        int,
        typer.Option(
            "--max-rows", metavar="N", min=1, help="Maximum number of rows to generate answers for."
        ),
    ] = 200
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Rows scored at once; numbers do not depend on it."
        ),
    ] = None

    precision: Annotated[
        PrecisionChoice,
        typer.Option(
            "--precision",
            help="Precision of matrix products. Only in fp32 numbers do not depend on --batch-size and are kept with the run.",
        ),
    ] = PrecisionChoice.FP32

    checks: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            metavar="auto|none|NAME[,NAME]",
            help="Checks beside exact match: tool, fields, label, number, json, regex:PATTERN or FILE.py:function, which runs "
            "the file. By default the one that fits the expected answers.",
        ),
    ] = None

    forgetting: Annotated[
        bool,
        typer.Option(
            "--forgetting",
            help="Also score general text, of the program's own, to see what the model has forgotten beside its base.",
        ),
    ] = False

    is_tried: Annotated[
        bool,
        typer.Option(
            "--try",
            help="Also ask the base with training rows in its prompts, as sft try does, and compare all with the tuned model.",
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitFlags:
    """Numbers that end the command with 3."""

    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above", metavar="METRIC=VALUE", help="Exit with 3 if the number is larger. Repeatable."
        ),
    ] = None
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under", metavar="METRIC=VALUE", help="Exit with 3 if the number is smaller. Repeatable."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareFlags:
    """An earlier evaluation to compare with, and a file for systems of continuous integration."""

    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Compare row by row with this eval.json, or that of a run; exit with 3 if more answers are wrong than chance "
            "explains.",
        ),
    ] = None
    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Also write the numbers to this file as JUnit XML, a test case each.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFlags:
    """Tasks of lm_eval that are asked in place of rows."""

    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="NAME[,NAME]", help="Run these lm_eval tasks instead of the held-out rows."
        ),
    ] = None
    task_path: Annotated[
        Path | None,
        typer.Option(
            "--task-path", metavar="DIR", help="Folder with your own task files; they may contain code."
        ),
    ] = None
    task_rows: Annotated[
        int | None,
        typer.Option("--task-rows", metavar="N", min=1, help="Maximum number of questions per task."),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            metavar="N",
            min=0,
            help="Few-shot examples before each question of --tasks; with --try 1 or more, 8 unless set.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was measured of a model, for limits and for ``--json``, and how it compares with an earlier evaluation."""

    model: str
    numbers: "Mapping[str, float]"
    document: "Mapping[str, object]"
    against: "Against | None" = None


@command
def evaluate(
    *,
    scored: ScoredFlags,
    fail: LimitFlags,
    compare: CompareFlags,
    asked: TaskFlags,
    processes: Processes = 1,
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Score a model on its held-out rows beside the model it started from: loss, answers, repetition, copying.

    Examples:
      sft eval

      sft eval my-run --data test.jsonl --no-base

      sft eval my-run --text wiki.txt

      sft eval --fail-above loss=1.0 --fail-under match_fraction=0.5

      sft eval --check fields --fail-under fields.city=0.9

      sft eval --fail-above forgetting=0.1

      sft eval --try --max-rows 60

      sft eval --against first --junit eval.xml

      sft eval --tasks arc_easy --task-rows 100 --fail-under arc_easy/acc=0.5
    """
    from sftcli.services.evaluate.against import read_earlier, set_against
    from sftcli.services.evaluate.checks.table import read_check_names
    from sftcli.services.evaluate.limits import read_limits, require_measurable
    from sftcli.services.evaluate.request import check_names

    limits = read_limits(fail.fail_above or (), fail.fail_under or ())
    _check_compared(compare, asked, scored)
    _check_tasks(asked, scored, processes)
    _check_try(asked, scored, processes)
    if asked.tasks is not None:
        check_names(_request(scored, runs), needs_rows=False)
        answered = _ask_tasks(asked.tasks, asked, scored, runs, output)
        outcome = Outcome(model=answered.model, numbers=answered.numbers(), document=asdict(answered))
        _judge(outcome, limits, compare, output)
        return
    checks = read_check_names(scored.checks or ())
    require_measurable(limits, checks)
    shots = (DEFAULT_SHOTS if asked.shots is None else asked.shots) if scored.is_tried else None
    request = replace(_request(scored, runs), checks=checks, limits=limits, shots=shots)
    if request.texts:
        check_names(request)
        read = _score_texts(request, output)
        outcome = Outcome(model=read.tuned.model, numbers=read.numbers(), document=asdict(read))
        _judge(outcome, limits, compare, output)
        return
    earlier = None if compare.against is None else read_earlier(compare.against, runs)
    if not is_one_of_several():
        check_names(request)
        if processes > 1:
            raise typer.Exit(start_several(processes, output))
    report = _score_rows(request, output)
    outcome = Outcome(model=report.tuned.model, numbers=report.numbers(), document=report.to_json())
    if earlier is not None:
        outcome = replace(outcome, against=set_against(earlier, report.answers))
    _judge(outcome, limits, compare, output)


def _check_compared(compare: CompareFlags, asked: TaskFlags, scored: ScoredFlags) -> None:
    """Refuse to compare what has no scores of rows, and a place for the outcome that cannot be written.

    Raises:
        UsageError: Tasks or texts are to be compared with an earlier evaluation.
        OutputError: The file for systems of continuous integration cannot be made.
    """
    if compare.junit is not None:
        from sftcli.services.evaluate.junit import check_place

        check_place(compare.junit)
    other = "--tasks" if asked.tasks is not None else "--text" if scored.texts else ""
    if scored.forgetting and other:
        raise UsageError(f"{other} and --forgetting exclude each other", hint="run sft eval once for each")
    if compare.against is not None and other:
        raise UsageError(f"{other} and --against exclude each other", hint="answers to rows are compared")


def _check_tasks(asked: TaskFlags, scored: ScoredFlags, processes: int) -> None:
    """Refuse what does not go with tasks or texts, and flags of tasks without one.

    Raises:
        UsageError: There is such a flag, or lm_eval is not installed.
    """
    if scored.texts:
        if asked.tasks is not None or scored.data:
            raise UsageError(
                "--text, --data and --tasks exclude each other", hint="run sft eval once for each"
            )
        if processes > 1:
            raise UsageError(
                "--text and --processes exclude each other", hint="texts are scored in one process"
            )
    if asked.tasks is not None:
        if processes > 1:
            raise UsageError("--tasks and --processes exclude each other", hint="lm_eval runs in one process")
        if scored.data:
            raise UsageError("--tasks and --data exclude each other", hint="run sft eval once for each")
        if scored.checks:
            raise UsageError("--tasks and --check exclude each other", hint="run sft eval once for each")
        require_package("lm_eval", extra="eval", needed_by="--tasks", package="lm-eval")
    elif asked.task_path is not None or asked.task_rows is not None:
        raise UsageError("--task-path and --task-rows need --tasks", hint="name tasks: --tasks NAME")
    elif asked.shots is not None and not scored.is_tried:
        raise UsageError(
            "--shots needs --tasks or --try", hint="name tasks with --tasks NAME, or try rows with --try"
        )


def _check_try(asked: TaskFlags, scored: ScoredFlags, processes: int) -> None:
    """Refuse what does not go with examples in prompts: those are training rows of the run, and the base is asked.

    Raises:
        UsageError: There is such a flag.
    """
    if not scored.is_tried:
        return
    others = {
        "--tasks": asked.tasks is not None,
        "--text": bool(scored.texts),
        "--data": bool(scored.data),
        "--no-base": scored.no_base,
        "--processes": processes > 1,
        "--shots 0": asked.shots == 0,
    }
    if other := next((flag for flag, is_given in others.items() if is_given), ""):
        raise UsageError(
            f"--try and {other} exclude each other",
            hint="--try asks the base of a run its held-out rows behind training rows, in one process",
        )


def _ask_tasks(
    names: str, asked: TaskFlags, scored: ScoredFlags, runs: Path, output: Output
) -> "TasksReport":
    with session(output) as current:
        with current.loading():
            from sftcli.services.evaluate.tasks import TasksRequest, run_tasks

        request = TasksRequest(
            checkpoint=scored.checkpoint,
            names=tuple(name.strip() for name in names.split(",") if name.strip()),
            task_path=asked.task_path,
            base=scored.base,
            with_base=not scored.no_base,
            shots=asked.shots,
            most=asked.task_rows,
            batch_size=scored.batch_size,
            root=runs,
            tokenizer=scored.model.tokenizer,
            base_model=scored.model.base_model,
            trusts_code=scored.model.trusts_code,
            precision=scored.precision.value,
        )
        report = run_tasks(request, current)
    if not output.json:
        results.show_tasks(report, output)
    return report


def _request(scored: ScoredFlags, runs: Path) -> "EvalRequest":
    from sftcli.services.evaluate.request import EvalRequest

    return EvalRequest(
        checkpoint=scored.checkpoint,
        tokenizer=scored.model.tokenizer,
        base_model=scored.model.base_model,
        data=tuple(scored.data or ()),
        texts=tuple(scored.texts or ()),
        ignored=tuple(scored.ignored or ()),
        base=scored.base,
        with_base=not scored.no_base,
        max_rows=scored.max_rows,
        root=runs,
        batch_size=scored.batch_size,
        trusts_code=scored.model.trusts_code,
        precision=scored.precision.value,
        forgetting=scored.forgetting,
    )


def _score_rows(request: "EvalRequest", output: Output) -> "EvalReport":
    with session(output) as current:
        with current.loading():
            from sftcli.services.evaluate.evaluate import run_evaluation

        report = run_evaluation(request, current)
    if not output.json:
        results.show_scores(report, output)
        show_checks(report, output)
        show_tried(report, output)
    return report


def _score_texts(request: "EvalRequest", output: Output) -> "TextReport":
    with session(output) as current:
        with current.loading():
            from sftcli.services.evaluate.texts import run_texts

        report = run_texts(request, current)
    if not output.json:
        results.show_texts(report, output)
    return report


def _judge(outcome: Outcome, limits: "Sequence[Limit]", compare: CompareFlags, output: Output) -> None:
    """Check limits before ``--json`` prints its one object, which it prints also on failure.

    Raises:
        ThresholdError: A limit is broken, or the answers are worse than they were.
    """
    from sftcli.services.evaluate.limits import check_limits

    against = outcome.against
    if compare.junit is not None and is_first():
        from sftcli.services.evaluate.junit import cases_of, write_junit

        write_junit(cases_of(outcome.numbers, limits, against), compare.junit, model=outcome.model)
    if against is not None and not output.json:
        results.show_against(against, output)
    broken = [] if against is None else against.worse()
    try:
        check_limits(outcome.numbers, limits)
    except ThresholdError as error:
        broken.insert(0, error.message)
    if broken:
        raise ThresholdError("; ".join(broken))
    if output.json:
        compared = {} if against is None else {"against": against.to_json()}
        tables.show_result_json({**outcome.document, **compared})
