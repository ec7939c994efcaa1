"""What checks found, on the screen: numbers on stdout, and what they come to on stderr."""

from itertools import repeat
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.suggest import aside

if TYPE_CHECKING:
    from sftcli.services.evaluate.evaluate import EvalReport
    from sftcli.services.report.check_results import CheckedAnswer
    from sftcli.services.report.checks import ShownCheck, ShownLabels

MOST_PARTS = 12
MOST_WRONG = 3
MOST_LABELS = 6  # in a table on the screen


def show_checks(report: "EvalReport", output: options.Output) -> None:
    """Print the numbers of each check, the label table where it is small, and a line about each."""
    from sftcli.services.report.checks import checks_of

    out, err = tables.out(output.color), tables.err(output.color)
    for check in checks_of(report.checks):
        out.print()
        out.print(_measures(check))
        if check.labels is not None and len(check.labels.rows) <= MOST_LABELS:
            out.print()
            out.print(_confusion(check.labels))
        if not output.quiet:
            tables.show_text(f"{check.measures[0].name}: {check.line}", err, wrap=True)
            if wrong := [one for one in check.answers if one.tuned_score < 1][:MOST_WRONG]:
                tables.show_text(f"wrong: {', '.join(map(_place, wrong))}", err, wrap=True)
            if len(check.measures) > MOST_PARTS:
                tables.show_text(
                    f"{len(check.measures) - MOST_PARTS} more numbers are on the page and in --json", err
                )


def _place(one: "CheckedAnswer") -> str:
    """Return where a wrong answer is, and in which parts."""
    return f"{one.row}{aside(', '.join(one.wrong))}"


def _measures(check: "ShownCheck") -> tables.Grid:
    """Return the whole, and those parts that are wrong most often."""
    whole, *parts = check.measures
    if len(parts) >= MOST_PARTS:
        parts = sorted(parts, key=lambda part: part.tuned)[: MOST_PARTS - 1]
    return tables.comparison_table(
        [
            tables.Pair(
                metric=f"{one.name} (%)",
                first=one.base,
                second=one.tuned,
                lower_is_better=False,
                digits=1,
                rows=one.rows,
            )
            for one in (whole, *parts)
        ]
    )


def _confusion(labels: "ShownLabels") -> tables.Grid:
    aligns: list[tables.Align] = ["left"]
    aligns += repeat("right", len(labels.answered))
    return tables.Grid(
        header=("expected, answered:", *labels.answered),
        aligns=aligns,
        rows=[
            [tables.Cell(text=label), *(tables.Cell(text=f"{count:,}") for count in counts)]
            for label, _, counts in labels.rows
        ],
    )
