"""What is exported, as what and where, and the check of these names before torch is loaded."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sftcli import storage
from sftcli.errors import UsageError
from sftcli.services.models.reference import find_model
from sftcli.services.runs.lock import OutputLock

HINT = "choose another --out"
_DTYPES = ("f32", "bf16", "f16")


class ExportFormat(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PT = "pt"
    GGUF = "gguf"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Which model, as in ``choose_model``, to which format and place.

    ``dtype`` is that of the matrices: f32, bf16, f16, and for GGUF q8_0 too; None keeps that of the model (f32 where an
    adapter is merged), and takes f16 for GGUF.
    """

    checkpoint: str | None
    format: ExportFormat
    out: Path
    root: Path
    dtype: str | None = None
    tokenizer: str | None = None  # of a .pt file
    base_model: str | None = None  # of an adapter, where its base is not where it says


_ENDINGS = {
    ExportFormat.HF: "-hf",
    ExportFormat.PT: ".pt",
    ExportFormat.GGUF: ".gguf",
    ExportFormat.OLLAMA: "-ollama",
}


def default_out(
    checkpoint: str | None,
    form: ExportFormat,
    *,
    root: Path,
    tokenizer: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Return where a model is written that nobody gave a place: in the current folder, under its name or that of its run.

    Raises:
        NotFoundError, UsageError, DataError: As ``find_model``.
    """
    found = find_model(checkpoint, root=root, tokenizer=tokenizer, base_model=base_model)
    name = Path(found.name).resolve().name if found.run is None else found.run.name
    return Path(name + _ENDINGS[form])


def check_names(request: ExportRequest) -> None:
    """Find the model of ``request`` by name, and see that its place is free, before anything slow.

    Raises:
        NotFoundError, UsageError, DataError: As ``find_model``.
        OutputError, UsageError: As ``check_target``.
    """
    check_target(request)
    OutputLock(request.out).require_free()
    find_model(
        request.checkpoint, root=request.root, tokenizer=request.tokenizer, base_model=request.base_model
    )


def check_target(request: ExportRequest) -> None:
    """Make sure that the model can be written in its format where it is to go.

    Raises:
        OutputError: Something is there, or no folder can be.
        UsageError: The format has no such dtype.
    """
    allowed = {
        ExportFormat.HF: _DTYPES,
        ExportFormat.PT: ("f32",),
        ExportFormat.GGUF: (*_DTYPES, "q8_0"),
        ExportFormat.OLLAMA: (*_DTYPES, "q8_0"),
    }[request.format]
    if request.dtype is not None and request.dtype not in allowed:
        raise UsageError(
            f"--to {request.format} cannot be written as {request.dtype}", hint=f"choose {', '.join(allowed)}"
        )
    storage.require_new(request.out, hint=HINT)
