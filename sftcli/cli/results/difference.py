"""What two runs have not in common, on the screen."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import loss_text
from sftcli.figures import count

if TYPE_CHECKING:
    from rich.console import Console

    from sftcli.services.diff.compare import Difference
    from sftcli.services.diff.rows import RowChanges

SHOWN_ROWS = 5  # of a kind


def show_difference(found: "Difference", output: options.Output) -> None:
    """Print what differs, a block for each kind of thing; results on stdout, remarks on stderr."""
    if output.json:
        tables.show_result_json(found.to_json())
        return
    draw_difference(found, tables.out(output.color))
    for note in found.notes:
        tables.show_text(note, tables.err(output.color), wrap=True)


def draw_difference(found: "Difference", console: "Console") -> None:
    """Print what differs on ``console``."""
    tables.show_text(f"{found.before} -> {found.after}", console)
    for title, content in _blocks(found):
        tables.show_text(f"\n{title}", console)
        if isinstance(content, tables.Grid):
            console.print(content)
        else:
            for line in content:
                tables.show_text(f"  {line}", console)


def _blocks(found: "Difference") -> Iterator[tuple[str, tables.Grid | Sequence[str]]]:
    names = (found.before, found.after)
    if found.rows is not None:
        yield _rows_title(found.rows), list(_rows(found.rows))
    settings = [
        (one.key, f"{_value(one.before)}  ({one.before_from})", f"{_value(one.after)}  ({one.after_from})")
        for one in found.settings
    ]
    yield f"settings: {_number(len(settings))}", _grid("setting", names, settings)
    facts = [(one.name, one.before or "unknown", one.after or "unknown") for one in found.facts]
    yield f"versions: {_number(len(facts))}", _grid("of", names, facts)
    yield f"held-out loss: {_losses(found)}", []
    for moved in found.answers or ():
        right = _listed("became right", moved.became_right)
        yield f"answers, {moved}", [*right, *_listed("became wrong", moved.became_wrong)]
    if found.measures:
        yield "scores", tables.measures_table(found.measures, names=names)


def _grid(what: str, names: tuple[str, str], rows: Sequence[tuple[str, str, str]]) -> tables.Grid | list[str]:
    if not rows:
        return []
    return tables.Grid(header=(what, *names), rows=[[tables.Cell(text=text) for text in row] for row in rows])


def _rows_title(rows: "RowChanges") -> str:
    parts = {"added": rows.added, "gone": rows.gone, "changed": rows.changed, "in another split": rows.moved}
    said = [f"{count(len(found))} {what}" for what, found in parts.items() if found]
    return f"rows: {', '.join([*said, f'{count(rows.same)} the same'])}"


def _rows(rows: "RowChanges") -> Iterator[str]:
    yield from _listed("added", rows.added)
    yield from _listed("gone", rows.gone)
    yield from _listed(
        "changed",
        [
            f"{one.after}, {one.part}" + (f" (was {one.before})" if one.before != one.after else "")
            for one in rows.changed
        ],
    )
    yield from _listed(
        "moved", [f"{one.origin}, from {_split(one.before)} to {_split(one.after)}" for one in rows.moved]
    )


def _listed(what: str, names: Sequence[str]) -> Iterator[str]:
    yield from (f"{what}: {name}" for name in names[:SHOWN_ROWS])
    if len(names) > SHOWN_ROWS:
        yield f"{what}: {count(len(names) - SHOWN_ROWS)} more, all of them with --json"


def _losses(found: "Difference") -> str:
    losses = found.heldout
    before, after = loss_text(losses.before, losses.before_rows), loss_text(losses.after, losses.after_rows)
    if losses.before is None and losses.after is None:
        return "none was measured"
    same = {True: "on the same rows", False: "on other rows, so the two do not compare", None: ""}[
        losses.same_rows
    ]
    return f"{before} -> {after}" + (f", {same}" if same else "")


def _split(name: str) -> str:
    return {"train": "training", "heldout": "held-out"}.get(name, name)


def _number(count_of: int) -> str:
    return f"{count(count_of)} {'differs' if count_of == 1 else 'differ'}" if count_of else "none differs"


def _value(value: object) -> str:
    """Return a value as a settings file has it."""
    return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)
