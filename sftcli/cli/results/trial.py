"""What a model answers right without training, by how it was asked, and what a tuned one has to beat."""

from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.tables import Cell, Grid
from sftcli.figures import NOTHING, count, duration, share_of

if TYPE_CHECKING:
    from sftcli.services.evaluate.trial.trial import TrialReport, Way

_NAMES = {"alone": "no examples", "random": "random examples", "nearest": "nearest examples"}


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
            tables.show_text(f"{_NAMES[way.name]}: {text}", err, wrap=True)
    tables.show_text(_to_beat(report), err, wrap=True)
    tables.show_text(f"next: {train}, then sft eval --max-rows {report.max_rows}", err)


def _to_beat(report: "TrialReport") -> str:
    best = report.best
    with_ = f"{_NAMES[best.name]} and {count(best.mean_prompt_tokens)} tokens a prompt"
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


def _line(way: "Way") -> list[Cell]:
    shots = f"{way.mean_shots:.1f}".removesuffix(".0") if way.mean_shots else NOTHING
    texts = (
        _NAMES[way.name],
        share_of(way.matched, way.answered),
        shots,
        count(way.mean_prompt_tokens),
        count(way.cut),
        duration(way.seconds),
    )
    return [Cell(text=text) for text in texts]
