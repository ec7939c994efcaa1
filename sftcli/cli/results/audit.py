"""What ``sft prepare`` leaves on the screen: the audit on stderr, the rows that were asked for and the folder on stdout."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import signs
from sftcli.figures import count, percent

if TYPE_CHECKING:
    from rich.console import Console

    from sftcli.data.quality.audit_summary import AuditSummary, LengthBin
    from sftcli.services.prepare.prepare import PrepareOutcome

MAX_BAR = 40
_DUPLICATES = (
    ("duplicates", "duplicate_rows", "exact"),
    ("near duplicates", "near_duplicate_rows", "near"),
    ("also trained, nearly", "near_trained_rows", "near-trained"),
)


def show_prepared(outcome: "PrepareOutcome", output: options.Output) -> None:
    """Print what became of the rows; the place of the prepared ones only where they are fit to be trained on.

    Raises:
        DataError: They are not.
    """
    from sftcli.data.quality.audit import TITLES

    out, err = tables.out(output.color), tables.err(output.color)
    if not output.quiet:
        for split, audit in outcome.data.audit.items():
            if audit.rows:
                _show_audit(TITLES[split], audit, err)
    if outcome.shown:
        from sftcli.cli.results.rows import Legend, RowView

        if not output.quiet:
            err.print(Legend())
        for row in outcome.shown:
            out.print(RowView(row=row))
    outcome.fitness.require()
    if not output.quiet:
        what = (
            "written to:"
            if outcome.out
            else "kept in the cache, for trainings with the same rows and settings:"
        )
        tables.show_text(what, err)
    tables.show_text(outcome.out or outcome.folder, out)


def _show_audit(title: str, audit: "AuditSummary", err: "Console") -> None:
    err.print(tables.Grid(rows=[[tables.Cell(text=title, style="bold")]]))
    err.print(tables.key_value_table(list(_facts(audit))))
    if len(audit.sources) > 1:
        tables.show_text("", err)
        err.print(_sources_table(audit))
    tables.show_text("", err)
    err.print(length_table(audit, err))
    for note in audit.notes:
        tables.show_text(f"note: {note}", err)
    tables.show_text("", err)


def _facts(audit: "AuditSummary") -> Iterator[tuple[str, object]]:
    """Yield names and values of an audit, the ones that need a look last."""
    yield "rows", f"{count(audit.rows)}, {count(audit.kept)} kept"
    share = percent(audit.response_tokens / audit.tokens if audit.tokens else 0.0)
    yield (
        "tokens",
        f"{count(audit.tokens)}: {count(audit.response_tokens)} trained ({share}),"
        f" {count(audit.prompt_tokens)} prompt",
    )
    lengths = ", ".join(f"{p} % up to {count(length)}" for p, length in audit.length_percentiles.items())
    yield "length", f"{lengths}, longest {count(audit.longest_tokens)} ({audit.longest_row})"
    for reason, rows in audit.excluded.items():
        named = audit.excluded_rows.get(reason)
        yield f"left out: {reason}", f"{count(rows)}, such as {named[0]}" if named else count(rows)
    for reason, rows in audit.rejected.items():
        yield f"rejected: {reason}", f"{count(rows)}, such as {audit.rejected_rows[reason][0]}"
        yield "  what to do", audit.remedies[reason]
    for flag, rows in audit.flags.items():
        yield f"noticed: {flag}", f"{count(rows)}, such as {audit.flagged_rows[flag][0]}"
    for name, field, kind in _DUPLICATES:
        if rows := getattr(audit, field):
            yield name, f"{count(rows)}, such as {audit.duplicates[kind][0]}"
    if audit.max_tokens_for_99_percent > audit.max_tokens:
        yield "to keep 99 %", f"--max-tokens {audit.max_tokens_for_99_percent}"


def _sources_table(audit: "AuditSummary") -> tables.Grid:
    return tables.Grid(
        header=("source", "rows", "kept", "tokens", "trained"),
        aligns=("left", "right", "right", "right", "right"),
        rows=[
            [
                tables.Cell(text=source),
                *(
                    tables.Cell(text=count(getattr(counts, name)))
                    for name in ("rows", "kept", "tokens", "response_tokens")
                ),
            ]
            for source, counts in audit.sources.items()
        ],
    )


def length_table(audit: "AuditSummary", console: "Console") -> tables.Grid:
    """Return the lengths of the rows as bars."""
    most = max((part.rows for part in audit.length_histogram), default=1)
    labels = [f"up to {count(part.max_tokens)}" for part in audit.length_histogram]
    room = console.width - max(map(len, labels), default=0) - len(count(most)) - 18
    width = max(8, min(MAX_BAR, room))
    return tables.Grid(
        header=("tokens", "rows", ""),
        aligns=("right", "right", "left"),
        rows=[
            [
                tables.Cell(text=label, style="dim"),
                tables.Cell(text=count(part.rows)),
                _bar_cell(part, audit.max_tokens, part.rows / most, width, console.encoding),
            ]
            for label, part in zip(labels, audit.length_histogram, strict=True)
        ],
    )


def _bar_cell(part: "LengthBin", limit: int, share: float, width: int, encoding: str) -> tables.Cell:
    text = bar(share, width, encoding)
    if part.max_tokens // 2 < limit:  # the limit of the bin before
        return tables.Cell(text=text, style="green")
    return tables.Cell(text=f"{text} over {count(limit)}" if part.rows else text, style="yellow")


def bar(share: float, width: int, encoding: str) -> str:
    """Return a bar of up to ``width`` characters; the smallest share above 0 can still be seen."""
    if signs(encoding).ellipsis == "...":
        return "#" * max(round(share * width), int(share > 0))
    whole, eighths = divmod(max(round(share * width * 8), int(share > 0)), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()
