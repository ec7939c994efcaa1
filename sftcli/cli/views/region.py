"""Some lines at the bottom of a terminal that are drawn again and again, while other output scrolls above them."""

import os
import sys
from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING, cast

from rich.console import RenderHook
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.segment import ControlType
from rich.text import Text

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console, ConsoleRenderable
    from rich.segment import ControlCode


class Region(RenderHook):
    """A block of lines below everything else that goes to ``console``. Thread-safe.

    Unlike Rich's own ``Live`` it counts how many rows its lines take after the terminal became narrower and wrapped
    them, so that no half of an old block stays behind.

    Args:
        console: A console on a terminal.
        redirect_stdout: Whether what libraries print to stdout goes above the block too.
    """

    def __init__(self, console: "Console", *, redirect_stdout: bool) -> None:
        self._console = console
        self._redirect_stdout = redirect_stdout
        self._lines: Sequence[Text] = ()
        self._drawn: list[int] = []  # width in columns of each line on the screen
        # xterm, alone among the common ones, cuts lines instead of wrapping them.
        self._wraps = "XTERM_VERSION" not in os.environ
        self._streams: tuple[TextIO, TextIO] | None = None
        self._lock = RLock()

    def start(self) -> None:
        """Hide the cursor and take over the bottom of the terminal."""
        console = self._console
        console.show_cursor(False)
        self._streams = (sys.stdout, sys.stderr)
        if self._redirect_stdout:
            sys.stdout = cast("TextIO", FileProxy(console, sys.stdout))
        sys.stderr = cast("TextIO", FileProxy(console, sys.stderr))
        console.push_render_hook(self)

    def update(self, lines: Sequence[Text]) -> None:
        """Draw ``lines``, each on one row: what does not fit is cut."""
        with self._lock:
            self._lines = lines
        self._console.print(Control())

    def stop(self, *, keep: bool) -> None:
        """Give the terminal back; the block stays above the cursor if ``keep``, else it is wiped."""
        console = self._console
        try:
            if not keep:
                self.update(())
            console.pop_render_hook()
            if keep and self._drawn:
                console.line()
            console.show_cursor(True)
        finally:
            if self._streams is not None:
                sys.stdout, sys.stderr = self._streams
                self._streams = None

    def process_renderables(self, renderables: "list[ConsoleRenderable]") -> "list[ConsoleRenderable]":
        """Put the wiping of the old block before ``renderables`` and the new block after them."""
        with self._lock:
            columns = self._console.width
            wipe = self._wipe(columns)
            lines = [line.copy() for line in self._lines]
            for line in lines:
                line.truncate(columns)
            self._drawn = [line.cell_len for line in lines]
            block = Text("\n", end="").join(lines)
            block.no_wrap, block.overflow = True, "crop"
            return [wipe, *renderables, block]

    def _wipe(self, columns: int) -> Control:
        if not self._drawn:
            return Control()
        rows = len(self._drawn)
        if self._wraps:
            rows = sum(max(1, -(-width // columns)) for width in self._drawn)
        up: list[ControlCode] = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)]
        codes: list[ControlCode] = [(ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)]
        return Control(*codes, *up * (rows - 1))
