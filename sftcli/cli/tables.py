"""Results: the consoles they go to, the tables they are shown as, and their form as JSON."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sftcli.cli.grid import comparison_table, key_value_table, settings_table
from sftcli.cli.options import Color, Output, use_color
from sftcli.cli.text import clean, count, duration, writable

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.config.sources import Row
    from sftcli.services.evaluate import EvalReport
    from sftcli.services.generate import Completion
    from sftcli.services.train import TrainOutcome

_OFF_TERMINAL_COLUMNS = 10_000  # nothing is cut or wrapped in a file


def out(color: Color = Color.AUTO) -> Console:
    """Return the console for results, on stdout."""
    return make_console(sys.stdout, color)


def err(color: Color = Color.AUTO) -> Console:
    """Return the console for progress, warnings and errors, on stderr."""
    return make_console(sys.stderr, color)


def make_console(stream: "TextIO", color: Color = Color.AUTO) -> Console:
    """Return a console that prints text as it is: no markup, no emoji codes, no highlighting of numbers."""
    is_terminal = stream.isatty()
    colored = use_color(color, is_terminal=is_terminal)
    # Without a colour system Rich writes no style at all; its own no_color would leave bold and dim.
    return Console(
        file=stream,
        force_terminal=is_terminal,
        force_interactive=is_terminal,
        color_system=("auto" if is_terminal else "standard") if colored else None,
        no_color=not colored,
        width=None if is_terminal else _OFF_TERMINAL_COLUMNS,
        markup=False,
        emoji=False,
        highlight=False,
    )


def show_settings(rows: "Iterable[Row]", output: Output) -> None:
    """Print settings with where each was set; as JSON, ``{"settings": {key: {"value", "origin"}}}``."""
    listed = list(rows)
    if output.json:
        show_result({"settings": {row.key: {"value": row.value, "origin": row.origin} for row in listed}})
    else:
        out(output.color).print(settings_table([(row.key, row.value, row.origin) for row in listed]))


def show_pairs(pairs: Mapping[str, object], output: Output) -> None:
    """Print names and values; as JSON, one object of them."""
    if output.json:
        show_result(pairs)
    else:
        out(output.color).print(key_value_table(list(pairs.items())))


def show_training(outcome: "TrainOutcome", output: Output) -> None:
    """Print the folder of the final model on stdout, and what became of the run and what to do next on stderr."""
    talk = err(output.color)
    first, last = outcome.first_heldout_loss, outcome.last_heldout_loss
    if not output.quiet and first is not None and last is not None:
        talk.print(comparison_table([("held-out loss", first, last, True)], names=("before", "after")))
    if outcome.final is None:
        command = shlex.join(["sft", "resume", outcome.path])
        show_text(f"stopped at step {outcome.step} of {outcome.last_step}; go on with: {command}", talk)
        return
    show_text(outcome.final, out(output.color))
    if not output.quiet:
        show_text(f"next: {shlex.join(['sft', 'eval', outcome.path])}", talk)


def show_completion(completion: "Completion", output: Output) -> None:
    """End the line of an answer that was streamed to stdout, and say on stderr what it took."""
    if not completion.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if output.quiet:
        return
    speed = count(completion.new_tokens / completion.seconds) if completion.seconds > 0 else "?"
    line = f"{count(completion.new_tokens)} tokens in {duration(completion.seconds)} ({speed} tok/s)"
    if completion.finish == "length":
        line += "; cut at --max-new-tokens"
    err(output.color).print(Text(line, style="dim"))


def show_scores(report: "EvalReport", output: Output) -> None:
    """Print the scores of a model beside those of the base, and the rows that it got wrong."""
    base, tuned = report.base, report.tuned
    rows = [
        ("held-out loss", base.loss if base else None, tuned.loss, True),
        ("perplexity", base.perplexity if base else None, tuned.perplexity, True),
        ("exact answers (%)", 100 * base.match_fraction if base else None, 100 * tuned.match_fraction, False),
    ]
    console = out(output.color)
    console.print(comparison_table(rows))
    answered = f"{count(tuned.matched)} of {count(tuned.answered)} answered exactly"
    console.print(
        Text(f"{count(report.rows)} rows, {count(tuned.response_tokens)} response tokens; {answered}")
    )
    for miss in report.misses:
        console.print(Text(""))
        pairs = [
            ("row", miss.origin),
            ("prompt", miss.prompt),
            ("expected", miss.expected),
            ("answer", miss.answer),
        ]
        console.print(key_value_table(pairs))


def show_text(text: str, console: Console) -> None:
    """Print text of one or more lines, made harmless, without wrapping it."""
    safe = writable(clean(text, keep="\n\t"), console.encoding)
    console.print(Text(safe), soft_wrap=True)


def show_result(result: Mapping[str, object]) -> None:
    """Print ``result`` as the one JSON object of a command, with ``ok``; numbers that are not finite become null.

    Only ASCII is written: it is safe in every encoding and on every terminal.
    """
    write_json({"ok": True, **result})


def write_json(value: Mapping[str, object]) -> None:
    """Write one JSON object and a line end to stdout."""
    sys.stdout.write(json.dumps(_plain(value), allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    """Return ``value`` in types that JSON has.

    Raises:
        TypeError: It holds something that has no JSON form.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    raise TypeError(f"{type(value).__name__} has no JSON form")
