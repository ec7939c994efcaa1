"""A stop flag that is the same in all processes of a training, so that all stop at the same step."""

from dataclasses import dataclass, field

from sftcli.events import StopFlag
from sftcli.runtime import Clock
from sftcli.training.distributed.group import Group


@dataclass(slots=True, kw_only=True)
class TimedSaves:
    """The flag ``stop``, which also requests a checkpoint when none was started for ``seconds``; 0 for never.

    Of several processes the first one alone looks at its clock, and ``AgreedStop`` tells the others.
    """

    stop: StopFlag
    clock: Clock
    seconds: float
    group: Group
    begun_at: float

    def requested(self) -> bool:
        """Return whether to stop."""
        return self.stop.requested()

    def save_requested(self) -> bool:
        """Return whether to save and continue."""
        is_asked = self.stop.save_requested()
        return is_asked or (
            self.seconds > 0 and self.group.is_writer and self.clock() - self.begun_at >= self.seconds
        )


@dataclass(slots=True, kw_only=True)
class AgreedStop:
    """Set in every process once ``stop`` is set in one. All must check at the same steps."""

    stop: StopFlag
    group: Group
    _is_raised: bool = field(default=False, init=False)

    def requested(self) -> bool:
        """Return whether a stop was requested in any process."""
        self._is_raised = self._is_raised or self.group.any(self.stop.requested())
        return self._is_raised

    def save_requested(self) -> bool:
        """Return whether a checkpoint was requested in any process."""
        return self.group.any(self.stop.save_requested())
