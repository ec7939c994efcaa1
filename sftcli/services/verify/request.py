"""Which model is compared with which server, and the check of these names before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.training import Precision
from sftcli.errors import UsageError
from sftcli.services.models.reference import find_model
from sftcli.services.server.address import ServerAddress

ROWS = 20  # that are asked where nobody says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """``checkpoint`` as in ``choose_model``, a model of a run; at most ``rows`` of its held-out conversations are asked."""

    checkpoint: str | None
    server: ServerAddress
    root: Path
    rows: int = ROWS
    base_model: str | None = None
    precision: str = Precision.FP32


def check_names(request: VerifyRequest) -> None:
    """Find the model by name, before anything slow.

    Raises:
        NotFoundError, DataError: As ``find_model``.
        UsageError: No run has made it, so that no held-out rows are known.
    """
    found = find_model(request.checkpoint, root=request.root, base_model=request.base_model)
    if found.run is None:
        raise UsageError(
            f"--verify-server asks the held-out rows of a run, and {found.name} is not from one",
            hint="name the run or one of its checkpoints",
        )
