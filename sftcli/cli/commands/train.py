"""``sft train`` and ``sft resume``."""

import shlex
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import adapter as adapter_options
from sftcli.cli.options import complete
from sftcli.cli.options import data as data_options
from sftcli.cli.options import shared as options
from sftcli.cli.options.to_settings import choose_preset, data_flags, resolve_flags
from sftcli.cli.results import results
from sftcli.cli.session.processes import is_one_of_several, start_several
from sftcli.cli.session.session import LOADING, session
from sftcli.cli.terminal import tables
from sftcli.errors import SftError

if TYPE_CHECKING:
    from sftcli.config.layers import Override
    from sftcli.services.train.outcome import TrainOutcome


class Resume(StrEnum):
    """What to do when the run exists."""

    AUTO = "auto"


def train(
    preset: options.Preset = None,
    config: options.Config = None,
    sets: options.Set = None,
    max_steps: options.MaxSteps = None,
    seed: options.Seed = None,
    data: options.Data = None,
    heldout: options.Heldout = None,
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    trust_remote_code: options.TrustRemoteCode = False,
    renames: data_options.Map = None,
    ignored: data_options.Ignore = None,
    template: data_options.Template = None,
    train_on: data_options.TrainOn = None,
    max_tokens: data_options.MaxTokens = None,
    overlong: data_options.Overlong = None,
    allow_leak: data_options.AllowLeak = False,
    strict: data_options.Strict = False,
    lora: adapter_options.Lora = False,
    adapter: adapter_options.Adapter = None,
    rank: adapter_options.Rank = None,
    packing: options.Packing = None,
    run: options.RunName = None,
    track: options.Track = None,
    processes: options.Processes = None,
    on_existing: Annotated[
        Resume | None,
        typer.Option(
            "--resume",
            help="`auto` goes on with the run that --run names where it exists, and starts it otherwise.",
            rich_help_panel=options.SETTINGS_PANEL,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Show every setting, its value and where it was set, and do nothing else.",
            rich_help_panel=options.SETTINGS_PANEL,
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only measure a few steps and show what training would need: memory, steps, time. Writes no run.",
            rich_help_panel=options.SETTINGS_PANEL,
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    log_format: options.LogFormatChoice = None,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Fine-tune a model. Without arguments it runs the preset `quick`.

    Examples:
      sft train --data rows.jsonl --max-steps 200

      sft train --preset gpu --set training.learning_rate=2e-5

      sft train --data rows.jsonl --lora --rank 32
    """
    output = options.Output(json=json, quiet=quiet, verbose=verbose, color=color, log_format=log_format)
    chosen = choose_preset(preset, config, data)
    resolved = resolve_flags(
        preset=chosen,
        config=config,
        sets=sets,
        data=data,
        heldout=heldout,
        flags={
            "training.max_steps": ("--max-steps", max_steps),
            "training.seed": ("--seed", seed),
            "training.packing": ("--packing", packing),
            "training.processes": ("--processes", processes),
            "model.name": ("--model", model),
            "model.tokenizer": ("--tokenizer", tokenizer),
            "model.trust_remote_code": ("--trust-remote-code", trust_remote_code or None),
            **data_flags(
                renames=renames,
                ignored=ignored,
                template=template,
                train_on=train_on,
                max_tokens=max_tokens,
                overlong=overlong,
                allow_leak=allow_leak,
                strict=strict,
            ),
            **adapter_options.adapter_flags(lora=lora, adapter=adapter, rank=rank),
            "run.name": ("--run", run),
            "run.trackers": ("--track", track or None),
        },
    )
    if print_config:
        results.show_settings(resolved.rows(), output)
        return
    from sftcli.services.prepare.sources import find_sources
    from sftcli.services.train.requirements import check_machine, check_trackers

    check_machine(resolved.settings)
    check_trackers(resolved.settings.run)
    find_sources(resolved.settings.data)  # a slip in a name is told before torch is loaded
    count = resolved.settings.training.processes
    if count > 1 and not plan and not is_one_of_several():
        raise typer.Exit(start_several(count, output))
    with session(output, every_steps=resolved.settings.training.log_every_steps) as current:
        current.emit(LOADING)
        if plan:
            from sftcli.services.train.plan import plan_training

            planned = plan_training(resolved.settings, current)
            results.show_plan(planned, output)
            return
        from sftcli.services.train.lead import TrainRequest, run_training

        label = chosen or Path(config or "run").stem
        request = TrainRequest(
            resolved=resolved,
            label=label,
            command=shlex.join(["sft", *sys.argv[1:]]),
            auto=on_existing is Resume.AUTO,
        )
        outcome = run_training(request, current)
    _show(outcome, output, current.stop.exit_code)


def resume(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Run to go on with, by name or path; the newest unfinished one.",
            autocompletion=complete.runs,
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--checkpoint", metavar="STEP", help="Go on from the checkpoint of this step."),
    ] = None,
    sets: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Only replay the steps between two checkpoints and compare the result bit for bit; write nothing.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="KEY",
            help="Go on although this setting, or `data`, is not what the run was started with. Repeatable; recorded.",
        ),
    ] = None,
    break_lock: Annotated[
        bool, typer.Option("--break-lock", help="Take the run over from a process that is certainly dead.")
    ] = False,
    processes: options.Processes = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    log_format: options.LogFormatChoice = None,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Go on with a stopped run as if it had never stopped.

    Examples:
      sft resume

      sft resume my-run --checkpoint 200

      sft resume my-run --verify
    """
    output = options.Output(json=json, quiet=quiet, verbose=verbose, color=color, log_format=log_format)
    from sftcli.services.runs.folder import find_recorded
    from sftcli.services.train.requirements import check_machine

    overrides = _resume_overrides(sets, trust_remote_code=trust_remote_code, processes=processes)
    every_steps = 10
    # Of several processes the first one tells, once, what is wrong with the name.
    with suppress(SftError) if is_one_of_several() else nullcontext():
        settings = find_recorded(run, runs, overrides, finished=None if verify else False).settings
        every_steps = settings.training.log_every_steps
        if not is_one_of_several():
            check_machine(settings)
            if settings.training.processes > 1:
                raise typer.Exit(start_several(settings.training.processes, output))
    with session(output, every_steps=every_steps) as current:
        current.emit(LOADING)
        from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume

        request = ResumeRequest(
            root=runs,
            run=run,
            step=step,
            overrides=tuple(overrides),
            allowed=tuple(allow_change or ()),
            break_lock=break_lock,
        )
        proved = verify_resume(request, current) if verify else None
        outcome = None if verify else resume_training(request, current)
    if proved is not None:
        results.show_verified(proved, output)
    if outcome is not None:
        _show(outcome, output, current.stop.exit_code)


def _resume_overrides(
    sets: list[str] | None, *, trust_remote_code: bool, processes: int | None
) -> "list[Override]":
    from sftcli.config.layers import Override
    from sftcli.config.resolve import parse_set

    overrides = list(map(parse_set, sets or ()))
    if trust_remote_code:
        overrides.append(Override(key="model.trust_remote_code", value=True, origin="--trust-remote-code"))
    if processes is not None:
        overrides.append(Override(key="training.processes", value=processes, origin="--processes"))
    return overrides


def _show(outcome: "TrainOutcome", output: options.Output, stop_code: int) -> None:
    """Print how a run ended: the final model's path on stdout, the rest on stderr."""
    if output.json:
        tables.show_result_json(asdict(outcome))
    else:
        results.show_training(outcome, output)
    if outcome.final is None:
        raise typer.Exit(stop_code)
