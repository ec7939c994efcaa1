"""The window of the next step, laid out and sent while the device is at work on this one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sftcli.data.batches.batch import Batch
from sftcli.training.distributed.group import Group
from sftcli.training.state import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    plan: StepPlan
    step: int
    window: Sequence[Batch]


class WindowAhead:
    """Has the window of a step at hand, if it was prepared. A plan is a function of the step alone, so both are the same.

    There is no thread: a step is launched in a fraction of its time, and its host would wait for the rest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._prepared: _Prepared | None = None

    def prepare(self, plan: StepPlan, step: int, group: Group) -> None:
        """Lay out the window of the step after ``step`` finished ones, and send this process's part of it to the device."""
        try:
            window = list(plan.window(step))
            # Where processes share rows, each is cut on the host.
            for place, _ in group.rounds(range(len(window))) if group.parts == 1 else ():
                window[place] = window[place].to(self._device)
        except Exception:  # noqa: BLE001 - the step that needs these rows meets it again, and can be named
            self._prepared = None
        else:
            self._prepared = _Prepared(plan=plan, step=step, window=window)

    def take(self, plan: StepPlan, step: int) -> Sequence[Batch]:
        """Return the window of the step after ``step`` finished ones, once; one that another plan made is dropped."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.plan is plan and prepared.step == step:
            return prepared.window
        return plan.window(step)
