"""Progress in a notebook: one line with a bar that is written again and again, and lines for what stays."""

import sys
import time
from dataclasses import dataclass

from sftcli.cli.views.plain import PlainView, Task, write_text
from sftcli.cli.views.wording import progress_line, step_line
from sftcli.events import Progressed, StepDone

_BAR_WIDTH = 20


def notebook_view() -> "NotebookView":
    """Return the view of a cell: stdout is its output, where stderr would look like an error."""
    return NotebookView(stream=sys.stdout, get_time=time.monotonic, every_steps=1)


@dataclass(slots=True)
class NotebookView(PlainView):
    """Moves with carriage returns alone, which every notebook knows, so that no widgets are needed."""

    _width: int = 0  # of the moving line; 0 where there is none

    def close(self) -> None:
        """End the moving line."""
        self._settle()

    def _write(self, text: str) -> None:
        self._settle()
        PlainView._write(self, text)

    def _step(self, event: StepDone) -> None:
        self.measures.add_step(event)
        self._move(self.measures.fraction, step_line(self.measures, event))

    def _progress(self, event: Progressed) -> None:
        now = self.get_time()
        begin = self._tasks.setdefault(event.task, Task(start=now, due=now)).start
        self._move(event.done / event.total if event.total else 0.0, progress_line(event, now - begin))
        if event.total and event.done >= event.total:
            self._settle()
            self._tasks.pop(event.task)

    def _move(self, fraction: float, text: str) -> None:
        full = round(_BAR_WIDTH * min(max(fraction, 0.0), 1.0))
        line = f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {text}"
        write_text(self.stream, "\r" + line.ljust(self._width))
        self._width = len(line)

    def _settle(self) -> None:
        if self._width:
            write_text(self.stream, "\n")
            self._width = 0
