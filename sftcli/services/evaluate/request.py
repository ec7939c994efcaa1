"""Which model is scored on which rows, and the check of these names before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from sftcli.data.reading.source import parse_source
from sftcli.errors import UsageError
from sftcli.services.evaluate.checks.table import AUTO
from sftcli.services.evaluate.limits import FORGETTING, Limit
from sftcli.services.models.reference import find_model
from sftcli.services.runs.lock import EvaluationLock

KEPT_PRECISION = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """Which model on which rows.

    ``checkpoint`` as in ``choose_model``. ``data`` names the rows; without it they are the held-out rows of the run that
    made the model. The score is set beside that of ``base``, by default the model that the run started from. At most
    ``max_rows`` rows, spread evenly, are answered by generation; all of them are scored for loss.
    """

    checkpoint: str | None
    data: tuple[str, ...]
    base: str | None
    with_base: bool
    max_rows: int
    root: Path
    batch_size: int | None = None  # rows at once; numbers do not depend on it
    tokenizer: str | None = None  # of a .pt file
    texts: tuple[str, ...] = ()  # files of plain text that are scored in place of rows
    ignored: tuple[str, ...] = ()  # keys of the rows that are dropped, with those that the run drops
    trusts_code: bool = False  # that of the run, and of the model it started from
    base_model: str | None = None  # of an adapter, where its base is not where it says
    precision: str = KEPT_PRECISION  # of matrix products; scores in another one are not kept with the run
    checks: tuple[str, ...] = (AUTO,)  # names, as ``read_check_names`` returns them
    shots: int | None = (
        None  # examples before each question that the base is asked once more; None asks it alone
    )
    forgetting: bool = False  # whether general text is scored too; a limit on it asks for that as well
    limits: tuple[Limit, ...] = ()  # that the numbers of checks have to be there for

    @property
    def asks_forgetting(self) -> bool:
        """Whether general text is scored, to see what the model has forgotten."""
        return self.forgetting or any(limit.metric == FORGETTING for limit in self.limits)

    @property
    def is_kept(self) -> bool:
        """Whether its scores are kept with the run that made the model: of its own rows, in one precision."""
        return not (self.data or self.texts) and self.precision == KEPT_PRECISION


def check_names(request: EvalRequest, *, needs_rows: bool = True) -> None:
    """Find models and rows of ``request`` by name, before anything slow; tasks are scored without rows.

    Raises:
        NotFoundError, UsageError, DataError: As ``find_model``, or there are no such rows.
        OutputError: Another process scores the run.
    """
    found = find_model(
        request.checkpoint,
        root=request.root,
        tokenizer=request.tokenizer,
        trusts_code=request.trusts_code,
        base_model=request.base_model,
    )
    if request.with_base and request.base is not None:
        find_model(request.base, root=request.root)
    for name in (*request.data, *request.texts):
        parse_source(name)
    if needs_rows and not request.texts and found.run is None and not request.data:
        raise no_heldout_of(found.name)
    if needs_rows and found.run is not None and request.is_kept:
        EvaluationLock(found.run).require_free()


def no_heldout_of(name: str) -> UsageError:
    """Return the error of a model that is to be scored on rows that nobody has named."""
    return UsageError(f"{name} is not from a run with held-out rows", hint="name rows with --data FILE")
