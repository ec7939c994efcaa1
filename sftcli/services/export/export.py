"""Export a trained model: as a Hugging Face folder, as a ``.pt`` file of its pipeline, or as GGUF; adapters merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from sftcli import storage
from sftcli.errors import StoppedError, UsageError
from sftcli.events import EventSink, Notice, Session, Warned
from sftcli.figures import short_count
from sftcli.json_files import read_json
from sftcli.modeling.formats.folder_write import exact_dtype, save_model_folder
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.load import count_parameters, take_names
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.runtime import dtype_name
from sftcli.services.export.request import HINT, ExportFormat, ExportRequest, check_target
from sftcli.services.models.base import needed_base
from sftcli.services.models.choose import ModelChoice, choose_model, handed_on_dtype, load_choice
from sftcli.services.models.modern_llm import export_pt
from sftcli.services.report.model_card import base_of, license_of, model_card, portable
from sftcli.services.report.modelfile import Turns, find_shape, modelfile
from sftcli.services.report.usage import kind_of, usage_of_gguf, usage_of_model
from sftcli.services.runs.lineage import MARK, mark_of
from sftcli.services.runs.lock import OutputLock
from sftcli.training.checkpoint.format import STATE, read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.state import TrainingSnapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.modeling.formats.gguf.gguf_export import GgufType

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOutcome:
    """What was written."""

    path: str
    format: str
    model: str
    dtype: str
    bytes: int


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
    write = {
        ExportFormat.HF: _write_hf,
        ExportFormat.PT: _write_pt,
        ExportFormat.GGUF: _write_gguf,
        ExportFormat.OLLAMA: _write_ollama,
    }
    with OutputLock(request.out, session.emit):
        check_target(request)  # another process may have made it meanwhile
        if session.stop.requested():
            raise StoppedError
        dtype = write[request.format](request, choice, session)
    return ExportOutcome(
        path=str(request.out),
        format=request.format.value,
        model=choice.name,
        dtype=dtype,
        bytes=_bytes_of(request.out),
    )


def _load(choice: ModelChoice, emit: EventSink, dtype: torch.dtype) -> "PreTrainedModel":
    quiet_libraries()
    model = load_choice(choice, dtype=dtype, device=torch.device("cpu"))
    total, _ = count_parameters(model)
    # Nothing is computed with it, so neither a device nor a precision of products belongs here.
    emit(Notice(text=f"model {choice.name}: {short_count(total)} parameters, read as {dtype_name(dtype)}"))
    return model


def _write_hf(request: ExportRequest, choice: ModelChoice, session: Session) -> str:
    tokenizer = load_chat_tokenizer(choice.tokenizer_folder)
    dtype = handed_on_dtype(choice) if request.dtype is None else DTYPES[request.dtype]
    model = _load(choice, session.emit, _exact(choice) if request.dtype is None else dtype)
    if session.stop.requested():
        raise StoppedError
    source = _named_as(choice, model, session.emit)
    is_as_it_was = request.dtype is None and source == choice.folder
    session.emit(Notice(text=f"writing {request.out}{_rounding(choice, dtype)}"))
    save_model_folder(
        model,
        source=source,
        folder=request.out,
        tokenizer=choice.tokenizer_folder,
        stop_ids=tokenizer.stop_ids,
        dtype=None if is_as_it_was else dtype,  # None keeps the type of each tensor
        unchanged=model.state_dict().keys() if is_as_it_was else (),
        texts={
            "README.md": model_card(
                request.out.name, choice, usage_of_model(kind_of(source), request.out.name)
            )
        }
        | ({} if choice.run is None else {MARK: mark_of(choice.run)}),
        hint=HINT,
        is_new=True,
    )
    return next(name for name, known in DTYPES.items() if known == dtype)


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


def _exact(choice: ModelChoice) -> torch.dtype:
    """Return the dtype in which nothing is rounded before it is written."""
    return exact_dtype(choice.folder) if choice.base is None else torch.float32


def _rounding(choice: ModelChoice, dtype: torch.dtype) -> str:
    """Return what to say of an adapter's sums with its base, which few bits take a part of."""
    if choice.base is None:
        return ""
    if dtype == torch.float32:
        return ", the adapter merged in float32"
    return (
        f", the adapter merged in float32 and rounded once to {dtype_name(dtype)}; --dtype f32 loses nothing"
    )


def _write_gguf(request: ExportRequest, choice: ModelChoice, session: Session) -> str:
    from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, write_gguf
    from sftcli.modeling.formats.gguf.gguf_families import check_family

    kind = request.dtype or "f16"
    tokenizer = load_chat_tokenizer(choice.tokenizer_folder)
    model = _load(choice, session.emit, _exact(choice))
    check_family(model)
    with storage.whole_file(request.out, hint=HINT, is_new=True) as fresh:
        storage.disk.let_library_write(
            fresh.parent,
            lambda: write_gguf(
                fresh,
                model,
                tokenizer,
                source=choice.tokenizer_folder,
                kind=cast("GgufType", kind),
                facts=ModelFacts(
                    name=choice.run.name if choice.run else portable(choice.name),
                    license_name=license_of(choice),
                    base_model=base_of(choice),
                ),
                session=session,
            ),
        )
    return kind


def _write_ollama(request: ExportRequest, choice: ModelChoice, session: Session) -> str:
    """Write a folder with a GGUF file, a ``Modelfile`` and a card."""
    tokenizer = load_chat_tokenizer(choice.tokenizer_folder)
    bos = read_tokenizer_files(choice.tokenizer_folder).named.get("bos_token", "")

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.render(messages, tools=None, add_generation_prompt=True)

    found = find_shape(render, bos)
    if found is None:
        session.emit(
            Warned(
                text="the chat template is of no shape that is written for Ollama, which takes one that it knows or none: "
                "see `ollama show --template` before you rely on its answers"
            )
        )
    shape, system = found or (None, "")
    name = f"{request.out.name}.gguf"
    usage = usage_of_gguf(name, request.out.name, is_on_hub=False)
    with storage.atomic_folder(request.out, hint=HINT, is_new=True) as fresh:
        kind = _write_gguf(replace(request, out=fresh / name), choice, session)
        texts = {
            "Modelfile": modelfile(
                name,
                shape=shape,
                system=system,
                stops=[tokenizer.decode([token], skip_special=False) for token in sorted(tokenizer.stop_ids)],
                sampling=_sampling_of(choice),
            ),
            "README.md": model_card(request.out.name, choice, usage),
        }
        for file, text in texts.items():
            storage.write_file(fresh / file, [text.encode()])
    return kind


def _sampling_of(choice: ModelChoice) -> dict[str, float]:
    """Return what the generation settings of a model say about sampling, as Ollama names it; 0 where they take the likeliest."""
    path = choice.tokenizer_folder / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}
    if not stated.get("do_sample"):
        return {"temperature": 0.0} if "do_sample" in stated else {}
    found = {name: stated.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _write_pt(request: ExportRequest, choice: ModelChoice, session: Session) -> str:
    model = _load(choice, session.emit, torch.float32)
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
    return "f32"


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
