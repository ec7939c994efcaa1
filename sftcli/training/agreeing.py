"""A stop flag that is the same in all processes of a training, so that all stop at the same step."""

from dataclasses import dataclass, field

from sftcli.events import StopFlag
from sftcli.training.distributed import Group


@dataclass(slots=True, kw_only=True)
class AgreedStop:
    """Raised in every process once ``stop`` is raised in one. All have to ask at the same times."""

    stop: StopFlag
    group: Group
    _is_raised: bool = field(default=False, init=False)

    def requested(self) -> bool:
        """Tell whether one of the processes was asked to stop."""
        self._is_raised = self._is_raised or self.group.any(self.stop.requested())
        return self._is_raised

    def save_requested(self) -> bool:
        """Tell whether one of them was asked for a checkpoint."""
        return self.group.any(self.stop.save_requested())
