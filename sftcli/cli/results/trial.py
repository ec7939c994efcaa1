"""What a model answers right without training, by how it was asked, and what a tuned one has to beat."""

from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.tables import Cell, Grid
from sftcli.figures import NOTHING, count, duration, share_of

if TYPE_CHECKING:
    from sftcli.services.evaluate.evaluate import EvalReport
    from sftcli.services.evaluate.trial.trial import TrialReport, Way


def show_trial(report: "TrialReport", train: str, output: options.Output) -> None:
    """Print a line for each way of asking; then the figure to beat, and ``train``, the command that trains on the same rows."""
    tables.out(output.color).print(_table(report))
    if output.quiet:
        return
    from sftcli.services.report.measures import points_text

    err = tables.err(output.color)
    for way in report.ways:
        if way.difference is not None:
            text = points_text(way.difference, other="no examples")
            tables.show_text(f"{_name(way)}: {text}", err, wrap=True)
    tables.show_text(_to_beat(report), err, wrap=True)
    tables.show_text(f"next: {train}, then sft eval --max-rows {report.max_rows}", err)


def _to_beat(report: "TrialReport") -> str:
    best = report.best
    with_ = f"{_name(best)} and {count(best.mean_prompt_tokens)} tokens a prompt"
    if best.matched == best.answered:
        return (
            f"{report.model} answers all {count(best.answered)} right with {with_}: "
            "a tuned model can have shorter prompts, but no more right answers"
        )
    figure = share_of(best.matched, best.answered)
    if not best.matched:
        return f"a tuned model has to beat {figure}; an answer is right only if it is the expected text, so of free text this tells little"
    return f"a tuned model has to beat {figure}, which {report.model} answers right with {with_}"


def _table(report: "TrialReport") -> Grid:
    return Grid(
        header=("prompt", "exactly right", "examples", "tokens a prompt", "cut", "time"),
        aligns=("left", "right", "right", "right", "right", "right"),
        rows=[_line(way) for way in report.ways],
    )


def show_tried(report: "EvalReport", output: options.Output) -> None:
    """Print the base in each way of asking it and the tuned model; then the differences, by the check where there is one."""
    from sftcli.services.report.tried import tried_of

    tried = tried_of(report.tried)
    if not tried:
        return
    out, err = tables.out(output.color), tables.err(output.color)
    check = [tried[0].check] if tried[0].check else []
    lines = [(way.name, way.matched, *([way.score] if check else []), way.shots, way.tokens) for way in tried]
    out.print()
    out.print(
        Grid(
            header=("model, prompt", "exactly right", *check, "examples", "tokens a prompt"),
            aligns=("left", "right", "right", "right", "right"),
            rows=[[Cell(text=text) for text in line] for line in lines],
        )
    )
    if not output.quiet:
        for way in tried:
            if way.difference:
                tables.show_text(f"tuned, {way.check or 'exactly right'}: {way.difference}", err, wrap=True)


def _name(way: "Way") -> str:
    from sftcli.services.report.tried import WAYS

    return WAYS[way.name]


def _line(way: "Way") -> list[Cell]:
    shots = f"{way.mean_shots:.1f}".removesuffix(".0") if way.mean_shots else NOTHING
    texts = (
        _name(way),
        share_of(way.matched, way.answered),
        shots,
        count(way.mean_prompt_tokens),
        count(way.cut),
        duration(way.seconds),
    )
    return [Cell(text=text) for text in texts]
