"""``sft runs`` and ``sft show``: what became of earlier runs."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output, RunsRoot
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import loss_text, signs, sparkline
from sftcli.figures import count, counted, duration, percent, share_of

if TYPE_CHECKING:
    from sftcli.services.report.evaluation import Evaluation
    from sftcli.services.runs.summary import RunSummary

CURVE_COLUMNS = 32
SHOWN_WARNINGS = 3
STATE_STYLES = {"finished": "green", "scored": "green", "running": "cyan", "stopped": "yellow", "broken-off": "yellow",
                "damaged": "red"}  # fmt: skip


@command
def runs(
    *,
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="The same as `--runs DIR`.")] = None,
    root: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "color"],
) -> None:
    """List runs, newest first: where each stands, its steps, its losses.

    Examples:
      sft runs

      sft runs --json
    """
    with session(output):
        from sftcli.services.compare.record import list_comparisons
        from sftcli.services.runs.folder import refuse_run
        from sftcli.services.runs.summary import summarize_runs

        if folder is not None:
            refuse_run(folder, root)
        root = folder or root
        found, comparisons = summarize_runs(root), list_comparisons(root)
    if output.json:
        listed = {"runs": [asdict(summary) for summary in found]}
        tables.show_result_json({**listed, "comparisons": [asdict(one) for one in comparisons]})
        return
    for one in comparisons:
        text = f"comparison of {one.axis}, {one.name}: {one.done} of {one.runs} runs scored; sft runs {shlex.quote(one.path)}"
        tables.show_text(text, tables.err(output.color))
    if found:
        tables.out(output.color).print(_runs_table(found))
        err = tables.err(output.color)
        for damaged in (one for one in found if one.state == "damaged"):
            tables.show_text(f"warning: {damaged.warnings[-1]}", err)
        if unfinished := [one for one in found if one.state in {"stopped", "broken-off"}]:
            tables.show_text(f"resume with: sft resume {_argument(unfinished[0])}", err)
    elif not comparisons:
        tables.show_text(
            f"there are no runs under {root} yet; start one: sft train", tables.err(output.color)
        )


@command
def show(
    *,
    run: Annotated[
        str | None,
        typer.Argument(help="Run by name or path; the newest one.", autocompletion=complete.runs),
    ] = None,
    root: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "color"],
) -> None:
    """Show one run: what was trained on what, how it went, and what to do with it next.

    Examples:
      sft show

      sft show my-run --json
    """
    with session(output):
        from sftcli.services.report.evaluation import read_scores
        from sftcli.services.runs.folder import find_run, newest_run
        from sftcli.services.runs.summary import can_be_scored, summarize_run

        chosen = newest_run(root) if run is None else find_run(run, root)
        summary, scores = summarize_run(chosen), read_scores(chosen)
    if output.json:
        tables.show_result_json({**asdict(summary), "scores": None if scores is None else scores.to_json()})
        return
    out = tables.out(output.color)
    levels = signs(out.encoding).levels
    facts = [*_facts(summary, levels), *_score_facts(scores)]
    if chosen.report.is_file():
        facts.append(("report", str(chosen.report)))
    out.print(tables.key_value_table(facts))
    for warning in summary.warnings[-SHOWN_WARNINGS:]:
        tables.show_text(f"warning: {warning}", out)
    tables.show_text(
        f"next: {_next_command(summary, is_scored=scores is not None or not can_be_scored(chosen))}",
        tables.err(output.color),
    )


def _runs_table(found: "Sequence[RunSummary]") -> tables.Grid:
    return tables.Grid(
        header=("run", "state", "step", "loss", "held-out", "best", "started"),
        aligns=("left", "left", "right", "right", "right", "right", "left"),
        rows=[
            [
                tables.Cell(text=summary.name, style="bold"),
                tables.Cell(text=summary.state, style=STATE_STYLES[summary.state]),
                tables.Cell(text=_steps(summary)),
                tables.Cell(text=loss_text(summary.loss)),
                tables.Cell(text=loss_text(summary.heldout_loss, summary.heldout_rows)),
                tables.Cell(text=loss_text(summary.best_heldout_loss, summary.heldout_rows)),
                tables.Cell(text=_age(summary.started_at), style="dim"),
            ]
            for summary in found
        ],
    )


def _facts(summary: "RunSummary", levels: str) -> Iterator[tuple[str, object]]:
    yield "run", f"{summary.path} ({summary.state})"
    yield "started", f"{_age(summary.started_at)}, with: {summary.command}"
    yield "model", summary.model or None
    yield "data", summary.data or None
    speed = f", {count(summary.tokens_per_second)} tok/s" if summary.tokens_per_second else ""
    used = "" if summary.utilization is None else f", {percent(summary.utilization)} of the machine's peak"
    yield "step", f"{_steps(summary)}, {duration(summary.training_seconds)} of steps{speed}{used}"
    if summary.curve:
        yield "loss", f"{sparkline(summary.curve, CURVE_COLUMNS, levels)} {loss_text(summary.loss)}"
    if summary.first_heldout_loss is not None:
        rows = summary.heldout_rows
        best = f", best {loss_text(summary.best_heldout_loss, rows)} at step {summary.best_step}"
        of = f" ({counted(rows, 'row')})" if rows else ""
        first, last = loss_text(summary.first_heldout_loss, rows), loss_text(summary.heldout_loss, rows)
        from sftcli.services.runs.summary import not_since

        is_behind = summary.heldout_step < summary.step
        if is_behind and not summary.heldout_step:
            best = ""
        shown = not_since(first, last, summary.heldout_step) if is_behind else f"{first} at first, {last} now"
        yield "held-out loss", f"{shown}{best}{of}"
    if summary.score is not None:
        yield "answers", _score_text(summary)
    for kept in summary.earlier:
        yield "earlier rows", kept.in_words()
    if summary.experts and summary.first_experts:
        yield "experts", f"{summary.first_experts} at first; {summary.experts} now"
    if summary.router_aux_loss is not None:
        yield "router aux", loss_text(summary.router_aux_loss)
    yield "checkpoints", _checkpoint_steps(summary.checkpoints) if summary.checkpoints else None
    if summary.set_aside:
        back = f"sft resume {_argument(summary)} --checkpoint {summary.set_aside[-1]}"
        yield (
            "set aside",
            f"{_checkpoint_steps(summary.set_aside)}, until a newer one is safe; back with: {back}",
        )


def _score_text(summary: "RunSummary") -> str:
    """Return how many of the held-out answers are right, by a measure."""
    scores = (
        (summary.first_score, "at first"),
        (summary.score, "now"),
        (summary.best_score, f"at step {summary.best_step}"),
    )
    told = ", ".join(f"{percent(score)} {when}" for score, when in scores if score is not None)
    return f"{summary.measure} right {told} ({counted(summary.answered, 'answer')})"


def _score_facts(scores: "Evaluation | None") -> Iterator[tuple[str, object]]:
    """Yield what `sft eval` has found: how many answers were right, and the loss, each with the base's."""
    if scores is None:
        return
    named = [(scores.tuned, ""), *([(scores.base, " by the base")] if scores.base is not None else [])]
    matches = [f"{share_of(score.matched, score.answered)}{whose}" for score, whose in named]
    losses = [f"{loss_text(score.loss, score.rows)}{whose}" for score, whose in named]
    yield "scores", f"exactly right {', '.join(matches)}; loss {', '.join(losses)}"


def _checkpoint_steps(steps: "Sequence[int]") -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _next_command(summary: "RunSummary", *, is_scored: bool) -> str:
    name = _argument(summary)
    match summary.state:
        case "finished" if is_scored:
            return f'sft generate "your prompt" --checkpoint {name}'
        case "finished":
            return f"sft eval {name}"
        case "scored":
            return f"sft report {name}"
        case "running":
            return f"tail -f {shlex.quote(summary.path)}/training.log"
        case _:
            return f"sft resume {name}"


def _argument(summary: "RunSummary") -> str:
    from sftcli.services.runs.folder import RunFolder

    return RunFolder(Path(summary.path)).argument


def _steps(summary: "RunSummary") -> str:
    return (
        f"{count(summary.step)} of {count(summary.last_step)}" if summary.last_step else count(summary.step)
    )


def _age(started_at: str) -> str:
    """Return how long ago a time in ISO 8601 was, or the text itself where it is none."""
    try:
        seconds = (datetime.now(tz=UTC) - datetime.fromisoformat(started_at)).total_seconds()
    except (ValueError, TypeError):
        return started_at
    return f"{duration(max(0.0, seconds))} ago"
