"""The page about a run while it goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from sftcli.events import Event, FitEnded, HeldoutDone, unheard
from sftcli.runtime import monotonic
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.run import write_page

FIRST_AFTER = 60.0  # seconds: who starts a short run waits for its end
SHARE = 0.005  # of the time of a run goes into its page, at most


@dataclass(slots=True)
class LivePage:
    """A sink that writes the page of ``run`` after held-out losses, as often as costs next to nothing.

    It is called behind the log, from which the page is made. A page that cannot be written is left alone until the end of the
    run, where that is told.
    """

    run: RunFolder
    clock: Callable[[], float] = monotonic
    _not_before: float = field(init=False)

    def __post_init__(self) -> None:
        self._not_before = self.clock() + FIRST_AFTER

    def __call__(self, event: Event, /) -> None:
        """Write the page if it is due."""
        if isinstance(event, FitEnded):
            self._not_before = float("inf")
        begin = self.clock()
        if not isinstance(event, HeldoutDone) or not event.step or begin < self._not_before:
            return
        if write_page(self.run, unheard, goes_on=True):
            end = self.clock()
            self._not_before = end + (end - begin) / SHARE
        else:
            self._not_before = float("inf")
