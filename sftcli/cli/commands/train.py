"""``sft train`` and ``sft resume``."""

import shlex
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import ROW_FLAGS, SETTINGS_PANEL, Flags
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output, RunsRoot
from sftcli.cli.options.to_settings import (
    Layers,
    Set,
    or_default_preset,
    require_known_variables,
    resolve_for_training,
)
from sftcli.cli.results import results
from sftcli.cli.results.comparison import show_comparison, show_price
from sftcli.cli.session.processes import is_one_of_several, start_several, started
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.errors import DataError, SftError, UsageError
from sftcli.events import Notice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftcli.config.layers import Override
    from sftcli.config.schema.settings import Settings
    from sftcli.services.evaluate.limits import Limit
    from sftcli.services.train.run import TrainOutcome


TRAIN_FLAGS = (
    "--data", "--model", "--run", "--lora", "--learning-rate", "--epochs", "--batch-size", "--max-steps", "--max-time", "--heldout", "--replay", *ROW_FLAGS,
    "--adapter", "--rank", "--eval-every", "--save-every", "--packing", "--processes", "--seed", "--trust-remote-code", "--tokenizer",
    "--runs", "--price", "--for", "--track",
)  # fmt: skip


FailAbove = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-above",
        metavar="METRIC=VALUE",
        help="Training on from a run: exit with 3 if more of the rows that it answered right are lost, as in `lost=0.05`, or "
        "its held-out loss rises by more, as in `loss_rise=0.1`. Repeatable.",
        rich_help_panel=SETTINGS_PANEL,
    ),
]


class Resume(StrEnum):
    """What to do when the run exists."""

    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instead:
    """What is done in place of one training: several that differ in one thing, or nothing but to look ahead."""

    axis: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="AXIS=V1,V2,...",
            help="Train a short run for each value and compare them on the same held-out rows: rows=25%,100%, model=A,B, "
            "source=each-left-out, lr=1e-4,3e-4 or any setting.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = None
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            metavar="N",
            min=1,
            max=10,
            help="With --compare, train each value with so many seeds; by default one.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = None
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Show every setting, its value and where it was set, and do nothing else.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = False
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only measure a few steps and show what training would need: memory, steps, time. Writes no run.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = False


@command
def train(
    *,
    layers: Layers,
    flags: Annotated[Flags, *TRAIN_FLAGS],
    on_existing: Annotated[
        Resume | None,
        typer.Option(
            "--resume",
            help="`auto` resumes the run named by --run if it exists, and starts it otherwise.",
            rich_help_panel=SETTINGS_PANEL,
        ),
    ] = None,
    fail_above: FailAbove = None,
    instead: Instead,
    output: Output,
) -> None:
    """Fine-tune a model. Without arguments it runs the preset `quick`.

    Examples:
      sft train --data rows.jsonl --max-steps 200

      sft train --preset gpu --learning-rate 2e-5

      sft train --data rows.jsonl --lora --rank 32

      sft train --data rows.jsonl --compare rows=25%,50%,100%
    """
    begun = started()
    layers = or_default_preset(layers, flags)
    if instead.axis is not None and not instead.print_config:
        _compare(instead, layers, flags, auto=on_existing is Resume.AUTO, output=output)
        return
    if instead.seeds is not None:
        raise UsageError("--seeds goes with --compare", hint="one seed: --seed N")
    resolved = resolve_for_training(flags, layers)
    limits = _limits(fail_above or (), resolved.settings)
    if instead.print_config:
        with session(output) as current:
            current.note(resolved.notices)
        results.show_settings(resolved.rows(), output)
        return
    from sftcli.services.train.start.early import check_asked, check_start

    count = resolved.settings.training.processes
    if instead.plan or is_one_of_several():
        check_asked(resolved.settings)
    else:
        check_start(resolved.settings, auto=on_existing is Resume.AUTO)
        if count > 1:
            raise typer.Exit(start_several(count, output))
    planned = outcome = None
    with session(output, every_steps=resolved.settings.training.log_every_steps) as current:
        with current.loading():
            from sftcli.services.train.lead import TrainRequest, run_training
            from sftcli.services.train.plan import plan_training
        if instead.plan:
            current.note(resolved.notices)
            if count > 1:
                text = f"one process is measured here, alone; the {count} of the training share the rows of each step"
                current.emit(Notice(text=text))
            planned = plan_training(resolved.settings, current)
        else:
            request = TrainRequest(
                resolved=resolved,
                label=layers.preset or Path(layers.config or "run").stem,
                command=shlex.join(["sft", *sys.argv[1:]]),
                auto=on_existing is Resume.AUTO,
                begun=begun,
            )
            outcome = run_training(request, current)
    if planned is not None:
        results.show_plan(planned, output)
    if outcome is not None:
        _show(outcome, output, current.stop.exit_code, limits)


def _compare(instead: Instead, layers: Layers, flags: Flags, *, auto: bool, output: Output) -> None:
    """Train runs that differ in one thing, and show what they differ by; or only what that takes."""
    from sftcli.services.compare.start import CompareRequest, check_comparison, find_comparison

    request = CompareRequest(
        asked=instead.axis or "",
        seeds=instead.seeds or 1,
        resolve=lambda more: resolve_for_training(flags, layers, more=more),
    )
    comparison = find_comparison(request)
    check_comparison(comparison, auto=auto, plans=instead.plan)
    with session(output, every_steps=comparison.base.settings.training.log_every_steps) as current:
        with current.loading():
            from sftcli.services.compare.run import plan_comparison, run_comparison

        command = shlex.join(["sft", *sys.argv[1:]])
        planned = plan_comparison(comparison, current) if instead.plan else None
        report = None if instead.plan else run_comparison(comparison, current, command=command)
    if planned is not None:
        show_price(planned, output)
    if report is not None:
        show_comparison(report, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeFlags:
    """Which run goes on, from where, and with what changed."""

    run: Annotated[
        str | None,
        typer.Argument(
            help="Run to resume, by name or path; by default the newest unfinished one.",
            autocompletion=complete.runs,
        ),
    ] = None
    step: Annotated[
        int | None,
        typer.Option("--checkpoint", metavar="STEP", help="Resume from the checkpoint of this step."),
    ] = None
    sets: Set = None
    end: Annotated[Flags, "--epochs", "--max-steps"]
    trust: Annotated[Flags, "--trust-remote-code"]
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Only replay the steps between two checkpoints and compare the result bit for bit; write nothing.",
        ),
    ] = False
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="KEY",
            help="Resume even if this setting, or `data`, differs from the start of the run. Repeatable; recorded.",
        ),
    ] = None
    break_lock: Annotated[
        bool, typer.Option("--break-lock", help="Take over the run from a process that is certainly dead.")
    ] = False
    sharing: Annotated[Flags, "--processes"]
    fail_above: FailAbove = None
    runs: RunsRoot = Path("runs")

    def overrides(self) -> "list[Override]":
        """Return the settings that the user gave."""
        from sftcli.config.resolve import parse_set

        given = (self.end, self.trust, self.sharing)
        return [*map(parse_set, self.sets or ()), *(found for flags in given for found in flags.overrides())]

    def allowed(self) -> tuple[str, ...]:
        """Return the keys that may change; a flag for another end says so itself."""
        return (*(self.allow_change or ()), *(found.key for found in self.end.overrides()))


@command
def resume(*, asked: ResumeFlags, output: Output) -> None:
    """Resume a stopped run as if it had never stopped, or train a finished one longer.

    Examples:
      sft resume

      sft resume my-run --checkpoint 200

      sft resume my-run --epochs 5

      sft resume my-run --verify
    """
    from sftcli.services.runs.folder import find_recorded
    from sftcli.services.train.start.early import check_resume

    require_known_variables()
    overrides = asked.overrides()
    every_steps, limits = 10, _limits(asked.fail_above or ())
    # Of several processes the first one tells, once, what is wrong with the name.
    with suppress(SftError) if is_one_of_several() else nullcontext():
        recorded = find_recorded(asked.run, asked.runs, overrides, finished=None if asked.verify else False)
        settings = recorded.settings
        every_steps = settings.training.log_every_steps
        if not is_one_of_several():
            check_resume(
                recorded,
                step=asked.step,
                verify=asked.verify,
                allowed=asked.allowed(),
                breaks_lock=asked.break_lock,
            )
            if settings.training.processes > 1:
                raise typer.Exit(start_several(settings.training.processes, output))
    with session(output, every_steps=every_steps) as current:
        with current.loading():
            from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume

        request = ResumeRequest(
            root=asked.runs,
            run=asked.run,
            step=asked.step,
            overrides=tuple(overrides),
            allowed=asked.allowed(),
            break_lock=asked.break_lock,
        )
        proved = verify_resume(request, current) if asked.verify else None
        outcome = None if asked.verify else resume_training(request, current)
    if proved is not None:
        results.show_verified(proved, output)
    if outcome is not None:
        _show(outcome, output, current.stop.exit_code, limits)


def _limits(texts: "Sequence[str]", settings: "Settings | None" = None) -> "tuple[Limit, ...]":
    """Return the limits of what may be lost of earlier runs; of a new run with ``settings`` there has to be one.

    Raises:
        UsageError: There is no such number, or no run has made the model.
    """
    if not texts:
        return ()
    from sftcli.services.evaluate.limits import read_limits, require_number
    from sftcli.services.runs.earlier import NUMBERS
    from sftcli.services.runs.lineage import parent_of

    limits = read_limits(texts, ())
    for limit in limits:
        require_number(limit, NUMBERS)
    if settings is not None and parent_of(settings) is None:
        raise UsageError(
            f"{limits[0].text}: {settings.model.name} is not the model of a run, so that nothing of one can be lost",
            hint="name the run: --model RUN; the run's own rows are judged by sft eval --fail-above",
        )
    return limits


def _check(outcome: "TrainOutcome", limits: "Sequence[Limit]") -> None:
    """Compare what was lost of earlier runs with ``limits``.

    Raises:
        DataError: It was not measured.
        ThresholdError: It is more.
    """
    if not limits or outcome.final is None:
        return
    from sftcli.services.evaluate.limits import check_limits
    from sftcli.services.runs.earlier import numbers_of

    numbers = numbers_of(outcome.earlier)
    for limit in limits:
        if limit.metric not in numbers:
            raise DataError(
                f"{limit.text}: no earlier run has held-out rows on which {limit.metric} can be measured",
                hint="hold rows out in each run; lost needs answers that were right, and loss_rise needs none",
            )
    check_limits(numbers, limits)


def _show(outcome: "TrainOutcome", output: Output, stop_code: int, limits: "Sequence[Limit]") -> None:
    """Print how a run ended: the final model's path on stdout, the rest on stderr.

    With ``--json`` one object is printed, also where a limit is broken.
    """
    if output.json:
        _check(outcome, limits)
        tables.show_result_json(asdict(outcome))
    else:
        results.show_training(outcome, output)
    _check(outcome, limits)
    if outcome.final is None:
        raise typer.Exit(stop_code)
