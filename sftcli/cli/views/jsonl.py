"""Events as a stream of JSON objects, for programs that watch a command."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftcli.cli.views.plain import write_line
from sftcli.events import TextDelta, event_record

if TYPE_CHECKING:
    from typing import TextIO

    from sftcli.events import Event


@dataclass(slots=True)
class JsonLinesView:
    """One JSON object a line, with the fields of ``events.jsonl``; ASCII only. Generated text stays on stdout."""

    stream: "TextIO"

    def open(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: every line is out already."""

    def show_stopping(self) -> None:
        """Say that a stop was asked for."""
        write_line(self.stream, json.dumps({"event": "StopRequested"}))

    def __call__(self, event: "Event", /) -> None:
        """Write an event."""
        if not isinstance(event, TextDelta):
            write_line(self.stream, json.dumps(event_record(event), allow_nan=False))
