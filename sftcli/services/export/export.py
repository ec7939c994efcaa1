"""Export a trained model: as a Hugging Face folder, as a ``.pt`` file of its pipeline, or as GGUF; adapters merged or alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli import storage
from sftcli.errors import StoppedError, UsageError
from sftcli.events import EventSink, Notice, Session
from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.modeling.load import take_names
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.runtime import dtype_name
from sftcli.services.export.load import load_to_write, unrounded_dtype
from sftcli.services.export.read_back import compare_folder, compare_pt
from sftcli.services.export.request import HINT, ExportFormat, ExportRequest, check_target
from sftcli.services.models.base import needed_base
from sftcli.services.models.choose import ModelChoice, choose_model, handed_on_dtype
from sftcli.services.models.modern_llm import export_pt
from sftcli.services.report.model_card import model_card
from sftcli.services.report.usage import kind_of, usage_of_model
from sftcli.services.runs.lineage import MARK, mark_of
from sftcli.services.runs.lock import OutputLock
from sftcli.training.checkpoint.format import STATE, read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.state import TrainingSnapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.modeling.formats.logits import Agreement

_Writer = Callable[[ExportRequest, ModelChoice, Session], "tuple[str, Agreement | None]"]
DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOutcome:
    """What was written."""

    path: str
    format: str
    model: str
    dtype: str
    bytes: int
    logits: "Agreement | None" = None  # how near they are to the model's; None where memory is short for both


def run_export(request: ExportRequest, session: Session) -> ExportOutcome:
    """Write the model to ``request.out``, atomically.

    Raises:
        OutputError: ``out`` exists, another process makes it, or it cannot be written.
        UsageError: The model cannot be written in that format, or not with that dtype.
        StorageError: The disk is full.
        StoppedError: A stop was asked for.
    """
    check_target(request)
    choice = choose_model(
        request.checkpoint,
        tokenizer=request.tokenizer,
        root=request.root,
        emit=session.emit,
        base_model=request.base_model,
    )
    write = _writer_of(request.format)
    with OutputLock(request.out, session.emit):
        check_target(request)  # another process may have made it meanwhile
        if session.stop.requested():
            raise StoppedError
        dtype, logits = write(request, choice, session)
    return ExportOutcome(
        path=str(request.out),
        format=request.format.value,
        model=choice.name,
        dtype=dtype,
        bytes=_bytes_of(request.out),
        logits=logits,
    )


def _writer_of(form: ExportFormat) -> _Writer:
    """Return what writes the format. The package ``gguf`` and peft are imported where they are needed."""
    if form is ExportFormat.HF:
        return _write_hf
    if form is ExportFormat.PT:
        return _write_pt
    from sftcli.services.export.gguf import write_adapter_file, write_gguf_file
    from sftcli.services.export.ollama import write_ollama_folder

    return {
        ExportFormat.GGUF: write_gguf_file,
        ExportFormat.OLLAMA: write_ollama_folder,
        ExportFormat.GGUF_ADAPTER: write_adapter_file,
    }[form]


def _write_hf(
    request: ExportRequest, choice: ModelChoice, session: Session
) -> "tuple[str, Agreement | None]":
    tokenizer = load_chat_tokenizer(choice.tokenizer_folder)
    dtype = handed_on_dtype(choice) if request.dtype is None else DTYPES[request.dtype]
    model = load_to_write(choice, session.emit, unrounded_dtype(choice) if request.dtype is None else dtype)
    if session.stop.requested():
        raise StoppedError
    source = _named_as(choice, model, session.emit)
    is_as_it_was = request.dtype is None and source == choice.folder
    session.emit(Notice(text=f"writing {request.out}{_rounding(choice, dtype)}"))
    written_dtype = None if is_as_it_was else dtype  # None keeps the type of each tensor
    found: Agreement | None = None

    def check(fresh: Path) -> None:
        nonlocal found
        found = compare_folder(fresh, choice, model, dtype=written_dtype, emit=session.emit)

    save_model_folder(
        model,
        source=source,
        folder=request.out,
        tokenizer=choice.tokenizer_folder,
        stop_ids=tokenizer.stop_ids,
        dtype=written_dtype,
        unchanged=model.state_dict().keys() if is_as_it_was else (),
        texts={
            "README.md": model_card(
                request.out.name, choice, usage_of_model(kind_of(source), request.out.name)
            )
        }
        | ({} if choice.run is None else {MARK: mark_of(choice.run)}),
        hint=HINT,
        is_new=True,
        check=check,
    )
    return next(name for name, known in DTYPES.items() if known == dtype), found


def _named_as(choice: ModelChoice, model: "PreTrainedModel", emit: EventSink) -> Path:
    """Return the folder whose names and form ``model`` is written in: its own, or the one that its run started from.

    Raises:
        NotFoundError: It needs that one, and it is not there any more.
    """
    if choice.run is None or not (choice.weights_folder / STATE).is_file():
        return choice.weights_folder
    base = needed_base(choice.run, emit)
    if base is None:
        return choice.weights_folder
    take_names(model, base.folder)
    return base.folder


def _rounding(choice: ModelChoice, dtype: torch.dtype) -> str:
    """Return what to say of an adapter's sums with its base, which few bits take a part of."""
    if choice.base is None:
        return ""
    if dtype == torch.float32:
        return ", the adapter merged in float32"
    return (
        f", the adapter merged in float32 and rounded once to {dtype_name(dtype)}; --dtype f32 loses nothing"
    )


def _write_pt(
    request: ExportRequest, choice: ModelChoice, session: Session
) -> "tuple[str, Agreement | None]":
    model = load_to_write(choice, session.emit, torch.float32)
    if not isinstance(model, ModernLMForCausalLM):
        raise UsageError(
            f"{choice.name} is not a Modern LLM model, and only those have .pt files",
            hint="export with --to hf or --to gguf",
        )
    if session.stop.requested():
        raise StoppedError
    snapshot = _state_of(choice, model)
    without = "" if snapshot else ", without optimizer state: none is saved with these weights"
    session.emit(Notice(text=f"writing {request.out}{without}"))
    with storage.whole_file(request.out, hint=HINT, is_new=True) as fresh:
        export_pt(
            fresh,
            model,
            run=choice.run,
            name=request.out.stem,
            snapshot=snapshot,
        )
        found = compare_pt(fresh, choice, model, session.emit)
    return "f32", found


def _state_of(choice: ModelChoice, model: "PreTrainedModel") -> TrainingSnapshot | None:
    """Return the newest full state of the run that made a model, of those that hold its weights.

    An adapter's optimizer state is not that of the model it is merged into.
    """
    if choice.run is None or choice.base is not None:
        return None
    if (choice.folder / STATE).is_file():
        return read_snapshot(choice.folder)
    weights = dict(model.named_parameters())
    for folder in reversed(list_checkpoints(choice.run.checkpoints)):
        snapshot = read_snapshot(folder)
        if all(
            _is_made_of(weights[name], tensor) for name, tensor in snapshot.weights.items() if name in weights
        ):
            return snapshot
    return None


def _is_made_of(weight: torch.Tensor, master: torch.Tensor) -> bool:
    """Return whether a final weight is a float32 master, or its rounding where products ran in bfloat16."""
    return torch.equal(weight, master) or torch.equal(weight, master.bfloat16().float())


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
