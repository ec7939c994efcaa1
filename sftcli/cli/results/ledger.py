"""The ledger of a run's rows on the screen: what they cost, why some are listed, and the first of them."""

from typing import TYPE_CHECKING

from sftcli.cli.terminal import tables
from sftcli.figures import counted, loss_figure

if TYPE_CHECKING:
    from sftcli.cli.options.shared import Output
    from sftcli.services.report.ledger import Ledger, RowLosses

FIRST = 10  # rows on the screen; the page has more


def show_ledger(ledger: "Ledger", output: "Output") -> None:
    """Print the losses by source, how many rows are listed for each reason, and the rows that are most likely wrong."""
    console = tables.out(output.color)
    rows: list[tuple[str, object]] = [
        (
            f"{one.source} ({'held out' if one.split == 'heldout' else 'trained'})",
            f"{counted(one.rows, 'row')}: loss {loss_figure(one.before, one.rows)} before, {loss_figure(one.after, one.rows)} after",
        )
        for one in ledger.sources
    ]
    rows += [(reason.words, counted(count, "row")) for reason, count in ledger.counts.items()]
    console.print(tables.key_value_table(rows))
    first = [row for row in ledger.rows if row.reasons][:FIRST]
    for row in first:
        tables.show_text(_line(row), console, wrap=True)


def _line(row: "RowLosses") -> str:
    return f"{row.place}: {'; '.join(row.reasons.values())}"
