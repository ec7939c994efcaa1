"""How a run ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sftcli.config.schema.settings import Settings
from sftcli.data.quality.thresholds import LeftOut
from sftcli.events import Ending
from sftcli.services.diagnosis.verdict import Verdict
from sftcli.services.runs.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """How a run ended. Losses are nats per response token, the last one that of ``final``; None without held-out rows."""

    run: str
    path: str
    ending: Ending
    step: int
    last_step: int
    first_heldout_loss: float | None = None
    last_heldout_loss: float | None = None
    last_heldout_step: int = -1  # of that loss; -1 where there is none
    final: str | None  # folder of the tuned model; None when stopped before the end
    seconds: float = 0.0
    heldout_rows: int = 0  # that both losses are of
    # What this start found changed: kind (machine, changes, allowed) -> name -> what it was and is.
    changed: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    left_out: LeftOut | None = None  # rows that this start did not train on; None where it took all
    verdict: Verdict | None = None  # on the curves of the run up to the step of ``final``


def outcome_of(run: RunFolder, settings: Settings, ending: Ending, step: int) -> TrainOutcome:
    """Return how ``run`` ended at ``step``, without what only the process that led its training knows."""
    return TrainOutcome(
        run=run.name,
        path=str(run.path),
        ending=ending,
        step=step,
        last_step=settings.training.max_steps,
        final=str(run.final) if ending.is_complete else None,
    )
