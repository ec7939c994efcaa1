"""The table that a comparison ends with, and what follows from it; and its price before it is begun."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.tables import Cell, Grid
from sftcli.figures import are_few, change, count, figure, interval, too_few, whole_duration

if TYPE_CHECKING:
    from sftcli.services.compare.price import Price
    from sftcli.services.compare.summary import CompareReport, ValueResult
    from sftcli.services.report.score import Interval

_DIGITS = 3
_HEADINGS = {"loss": "held-out loss", "bits_per_byte": "bits a byte"}
_UNITS = {"loss": "nats/token", "bits_per_byte": "bits a byte"}


def show_price(price: "Price", output: options.Output) -> None:
    """Print how many runs there are and what they take."""
    if output.json:
        tables.show_result_json(asdict(price))
        return
    console = tables.out(output.color)
    rows = [(value, f"about {whole_duration(each)} a run") for value, each in price.seconds_of_a_run.items()]
    console.print(tables.key_value_table(rows))
    text = f"{price.runs} runs of {count(price.steps)} steps: about {whole_duration(price.seconds)} in all"
    tables.show_text(text, console)


def show_comparison(report: "CompareReport", output: options.Output) -> None:
    """Print the table of a comparison on stdout, and what it shows; what it does not show, and where it is kept, on stderr."""
    if output.json:
        tables.show_result_json(report.to_json())
        return
    out, err = tables.out(output.color), tables.err(output.color)
    out.print(comparison_table(report))
    tables.show_text(finding(report), out, wrap=True)
    if output.quiet:
        return
    tables.show_text(_basis(report), err, wrap=True)
    tables.show_text(f"kept in {report.folder}; its runs: sft runs {report.folder}", err)


def comparison_table(report: "CompareReport") -> Grid:
    """Return one line a value."""
    is_baseline = _leaves_sources_out(report)
    to = "on the others" if is_baseline else "to the best"
    return Grid(
        header=(report.axis, _HEADINGS[report.measure], to, "95% interval", "time"),
        aligns=("left", "right", "right", "right", "right"),
        rows=[_line(report, result) for result in report.values],
    )


def _line(report: "CompareReport", result: "ValueResult") -> list[Cell]:
    name = result.value
    if report.axis == "rows":
        name = f"{name} ({count(result.train_rows)} rows)"
    is_first = (
        result.value in (report.pick, *report.noise)
        or f"{result.value}".removeprefix("without ") in report.noise
    )
    score = "diverged" if result.score is None else figure(result.score, _DIGITS, report.heldout_rows)
    return [
        Cell(text=name, style="bold" if is_first else ""),
        Cell(text=score),
        *_difference(result.difference),
        Cell(text=whole_duration(result.seconds)),
    ]


def _difference(found: "Interval | None") -> tuple[Cell, Cell]:
    if found is None:
        return Cell(text="-"), Cell(text="-")
    if found.low is None or found.high is None:
        return Cell(text=change(found.value, _DIGITS, found.rows)), Cell(text=too_few(found.rows))
    return (
        Cell(text=change(found.value, _DIGITS, found.rows)),
        Cell(text=f"{found.low:+.{_DIGITS}f} to {found.high:+.{_DIGITS}f}"),
    )


def finding(report: "CompareReport") -> str:
    """Return in a sentence or two what the comparison shows."""
    if are_few(report.heldout_rows):
        return (
            f"too few held-out rows to tell: {report.heldout_rows}; hold out more with --set data.heldout_fraction=0.3, "
            "or name rows with --heldout"
        )
    if _leaves_sources_out(report):
        return _noise_text(report)
    parts = [] if report.axis != "rows" else [_doubling_text(report)]
    if report.pick is not None:
        parts.append(f"pick: {report.pick}")
    else:
        best, *others = report.close
        parts.append(
            f"too close to tell: {best} is not better than {' or '.join(others)} by more than chance"
        )
    return "; ".join(parts)


def _doubling_text(report: "CompareReport") -> str:
    found = report.doubling
    if found is None or found.low is None or found.high is None:
        return "doubling the rows: not known"
    gain = change(found.value, _DIGITS, found.rows)
    span = interval(found.low, found.high, _DIGITS, found.rows)
    helps = (
        "more rows help"
        if found.high < 0
        else "more rows do not help"
        if found.low > 0
        else "too close to tell whether more rows help"
    )
    return f"doubling the rows changes the loss by {gain} ({span}): {helps}"


def _noise_text(report: "CompareReport") -> str:
    if report.noise:
        without = "it" if len(report.noise) == 1 else "each"
        return f"noise: {', '.join(report.noise)}; without {without} the loss on the rows of the other sources is lower"
    unclear = [
        result.value.removeprefix("without ")
        for result in report.values
        if result.difference is not None and not result.difference.excludes_zero
    ]
    if unclear:
        return f"no source is seen to be noise; too close to tell of {', '.join(unclear)}"
    return "no source is noise: without any of them the loss on the rows of the others is higher"


def _basis(report: "CompareReport") -> str:
    """Say what the numbers are of, and what is not in them."""
    rows = "row" if report.heldout_rows == 1 else "rows"
    parts = [
        f"{_UNITS[report.measure]} on the same {count(report.heldout_rows)} held-out {rows}, after {count(report.steps)} steps each"
    ]
    if report.left_out_rows:
        parts.append(f"{count(report.left_out_rows)} more are too long for one of the models")
    if report.seeds == 1:
        parts.append(
            "one seed: how far another seed would move these numbers is not measured; --seeds 3 measures it"
        )
    else:
        parts.append(f"means of {report.seeds} seeds, whose spread is in the intervals")
    return "; ".join(parts)


def _leaves_sources_out(report: "CompareReport") -> bool:
    return report.axis == "source"
