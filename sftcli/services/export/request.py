"""What is exported, as what and where, and the check of these names before torch is loaded."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sftcli import storage
from sftcli.errors import UsageError
from sftcli.services.export.llama_quantize import find_program
from sftcli.services.models.reference import find_model
from sftcli.services.runs.lock import OutputLock

HINT = "choose another --out"
_DTYPES = ("f32", "bf16", "f16")
_QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PROGRAM_KINDS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
"""Of GGUF, those that a program of llama.cpp makes, which the user names."""


class ExportFormat(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PT = "pt"
    GGUF = "gguf"
    OLLAMA = "ollama"
    GGUF_ADAPTER = "gguf-adapter"


_DTYPES_OF = {
    ExportFormat.HF: _DTYPES,
    ExportFormat.PT: ("f32",),
    ExportFormat.GGUF: (*_DTYPES, *_QUANTIZED, *PROGRAM_KINDS),
    ExportFormat.OLLAMA: (*_DTYPES, *_QUANTIZED, *PROGRAM_KINDS),
    ExportFormat.GGUF_ADAPTER: _DTYPES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Which model, as in ``choose_model``, to which format and place.

    ``dtype`` is that of the matrices: f32, bf16, f16, and for GGUF quantized ones too; None keeps that of the model (f32 where
    an adapter is merged), and takes f16 for GGUF.
    """

    checkpoint: str | None
    format: ExportFormat
    out: Path
    root: Path
    dtype: str | None = None
    tokenizer: str | None = None  # of a .pt file
    base_model: str | None = None  # of an adapter, where its base is not where it says
    llama_quantize: str | None = None  # path or name of the program that makes PROGRAM_KINDS
    accepts_rounding: bool = False  # whether a file may compute something else than rounding explains


_ENDINGS = {
    ExportFormat.HF: "-hf",
    ExportFormat.PT: ".pt",
    ExportFormat.GGUF: ".gguf",
    ExportFormat.OLLAMA: "-ollama",
    ExportFormat.GGUF_ADAPTER: "-adapter.gguf",
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
        UsageError: The format has no such dtype, or what makes it is not named.
        NotFoundError: That is not there.
    """
    allowed = _DTYPES_OF[request.format]
    if request.dtype is not None and request.dtype not in allowed:
        raise UsageError(
            f"--to {request.format} cannot be written as {request.dtype}", hint=f"choose {', '.join(allowed)}"
        )
    needs_program = request.dtype in PROGRAM_KINDS
    if needs_program and request.llama_quantize is None:
        raise UsageError(
            f"--dtype {request.dtype} is made by a program of llama.cpp, and none is named",
            hint="name it with --llama-quantize PATH; or choose a --dtype that needs none, such as q5_1",
        )
    if request.llama_quantize is not None:
        if not needs_program:
            raise UsageError(
                f"--llama-quantize makes {', '.join(PROGRAM_KINDS)}, and --dtype is {request.dtype or 'not one of them'}",
                hint="choose one with --dtype, such as q4_k_m, or leave --llama-quantize out",
            )
        find_program(request.llama_quantize)
    storage.require_new(request.out, hint=HINT)
