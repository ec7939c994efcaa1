"""Answers on stdout: text as it comes, and completions when they are there."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import clean, writable
from sftcli.events import TextDelta
from sftcli.figures import counted

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.events import Event, EventSink
    from sftcli.services.generate.answerer import Completion
    from sftcli.services.generate.request import GenerateRequest


@dataclass(slots=True)
class TextWriter:
    """Hands events to a view, and writes generated text to a stream: harmless on a terminal, untouched into a file or pipe.

    Raises:
        BrokenPipeError: The reader is gone. This is a result, so it must not be lost in silence.
    """

    view: "EventSink"
    stream: (
        "TextIO | None"  # None is stdout when the text comes: while a panel stands, another one has its place
    )
    raw: bool

    def __call__(self, event: "Event", /) -> None:
        """Show ``event``; where it is a ``TextDelta``, write its text."""
        self.view(event)
        if isinstance(event, TextDelta):
            text = event.text if self.raw else clean(event.text, keep="\n\t")
            stream = sys.stdout if self.stream is None else self.stream
            stream.write(writable(text, stream.encoding))
            stream.flush()


def with_text(view: "EventSink") -> TextWriter:
    """Return ``view`` with generated text on stdout."""
    return TextWriter(view=view, stream=None, raw=not sys.stdout.isatty())


def show_completions(
    completions: Sequence["Completion"], request: "GenerateRequest", output: options.Output
) -> None:
    """Print the answers to a prompt as JSON or text; a single one stands there already, and gets its line end."""
    if output.json:
        records = [asdict(completion) for completion in completions]
        tables.show_result_json(records[0] if request.is_single else {"completions": records})
    elif request.is_single:
        tables.show_text("", tables.out(output.color))
        if completions[0].finish != "stop" and not output.quiet:
            tables.show_text(_cut_text(completions[0], request), tables.err(output.color))
    else:
        _show_several(completions, request, output)


def _cut_text(completion: "Completion", request: "GenerateRequest") -> str:
    if completion.finish == "length" and completion.new_tokens < request.sampling.max_new_tokens:
        is_served = request.server is not None
        why = "the server has no room for more" if is_served else "the model was made for no more positions"
        return f"cut after {counted(completion.new_tokens, 'token')}: {why}"
    if completion.finish == "length":
        return f"cut after {completion.new_tokens} tokens; --max-new-tokens allows more"
    return f"stopped after {counted(completion.new_tokens, 'token')}"


def _show_several(
    completions: Sequence["Completion"], request: "GenerateRequest", output: options.Output
) -> None:
    """Print each answer under a line that says whose it is."""
    samples = request.samples
    for number, completion in enumerate(completions):
        whose = ("base" if number < samples else "tuned") if request.with_base else "sample"
        place = f" {number % samples + 1}" if samples > 1 else ""
        cut = "" if completion.finish == "stop" else f" (cut after {completion.new_tokens} tokens)"
        tables.show_text(f"[{whose}{place}]{cut}\n{completion.text}\n", tables.out(output.color))
