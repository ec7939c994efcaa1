"""The table of answers that may go out, and what is said where there is none."""

from shlex import quote
from typing import TYPE_CHECKING

from sftcli.cli.terminal.tables import Cell, Grid

if TYPE_CHECKING:
    from sftcli.services.evaluate.evaluate import EvalReport
    from sftcli.services.report.confidence import Confidence


def confidence_table(confidence: "Confidence") -> Grid:
    """Return the cuts that can be chosen from, the strictest first."""
    from sftcli.services.report.confidence import COLUMNS

    return Grid(
        header=COLUMNS,
        aligns=["right" for _ in COLUMNS],
        rows=[[Cell(text=text) for text in line] for line in confidence.lines],
    )


def confidence_text(report: "EvalReport") -> str:
    """Say how the cuts are used, those that are kept with the run by what command; or why there is none."""
    from sftcli.services.evaluate.confidence import FEWEST_ROWS, WRONG_SHARES

    confidence = report.confidence
    if confidence.rows < FEWEST_ROWS:
        return (
            f"too few answers to tell which can go out unread: {confidence.rows}, and {FEWEST_ROWS} are needed; "
            f"{report.more_answers}"
        )
    if not confidence.choices:
        return (
            f"no answers can go out unread: even of the surest, more than {WRONG_SHARES[-1]:.0%} may be wrong "
            f"({confidence.measure})"
        )
    text = f"each line holds with 95% certainty for rows like these ({confidence.measure})"
    if not report.is_kept:
        return text
    return (
        f"{text}; to use the first: sft generate --file rows.jsonl --out sure.jsonl --rest unsure.jsonl "
        f"--min-confidence auto:{confidence.choices[0].wrong_at_most:g} --checkpoint {quote(report.tuned.model)}"
    )
