"""Write a model, or its adapter alone, as GGUF; what was written computes what the model does before it gets its name."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from sftcli import storage
from sftcli.errors import UsageError
from sftcli.events import Session
from sftcli.foreign import foreign_file
from sftcli.modeling.adapter.adapter import check_base, load_adapter, merge_in_place
from sftcli.modeling.adapter.gguf_adapter import StoredChanges, write_gguf_adapter
from sftcli.modeling.formats.folder_write import stored_dtype
from sftcli.modeling.formats.gguf.gguf_compare import compare_file
from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, write_gguf
from sftcli.modeling.formats.gguf.gguf_families import check_family
from sftcli.modeling.formats.gguf.gguf_kinds import FILE_TYPES, logits_limit
from sftcli.modeling.formats.logits import Agreement, agreement, logits_with, own_numbers
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.services.export.llama_quantize import find_program, quantize
from sftcli.services.export.load import load_to_write, unrounded_dtype
from sftcli.services.export.read_back import compared_ids, require_near
from sftcli.services.export.request import HINT, PROGRAM_KINDS, ExportRequest
from sftcli.services.models.choose import ModelChoice
from sftcli.services.report.model_card import base_of, license_of, portable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.modeling.formats.gguf.gguf_kinds import GgufType


def write_gguf_file(
    request: ExportRequest, choice: ModelChoice, session: Session
) -> tuple[str, Agreement | None]:
    """Write the whole model as one file; return its dtype and how near its logits are.

    Raises:
        UsageError: Its family or its tokenizer cannot be written.
        OutputError: A weight or the logits are not those of the model.
    """
    kind = request.dtype or "f16"
    model = load_to_write(choice, session.emit, unrounded_dtype(choice))
    check_family(model)
    with storage.whole_file(request.out, hint=HINT, is_new=True) as fresh:
        if kind in PROGRAM_KINDS:
            _write_by_program(request, choice, model, fresh, kind, session)
        else:
            _write_plain(choice, model, fresh, cast("GgufType", kind), session)
        with foreign_file(fresh, "cannot be read back"):
            found = compare_file(fresh, model, compared_ids(choice, model))
        require_near(found, kind, request, session)
    return kind, found


def _write_by_program(
    request: ExportRequest,
    choice: ModelChoice,
    model: "PreTrainedModel",
    fresh: Path,
    kind: str,
    session: Session,
) -> None:
    """Write a file in 16 bits in a folder that goes away, and let the program that the user named make ``kind`` of it."""
    assert request.llama_quantize is not None
    is_bfloat = stored_dtype(choice.folder) == torch.bfloat16 and choice.base is None
    with storage.scratch_folder(fresh.parent, hint=HINT) as scratch:
        wide = scratch / "wide.gguf"
        _write_plain(choice, model, wide, "bf16" if is_bfloat else "f16", session)
        program = find_program(request.llama_quantize)
        storage.disk.let_library_write(
            fresh.parent, lambda: quantize(program, wide, fresh, kind=kind, session=session)
        )


def _write_plain(
    choice: ModelChoice, model: "PreTrainedModel", path: Path, kind: "GgufType", session: Session
) -> None:
    storage.disk.let_library_write(
        path.parent,
        lambda: write_gguf(
            path,
            model,
            load_chat_tokenizer(choice.tokenizer_folder),
            source=choice.tokenizer_folder,
            kind=kind,
            facts=_facts(choice),
            session=session,
        ),
    )


def _facts(choice: ModelChoice) -> ModelFacts:
    return ModelFacts(
        name=choice.run.name if choice.run else portable(choice.name),
        license_name=license_of(choice),
        base_model=base_of(choice),
    )


def write_adapter_file(
    request: ExportRequest, choice: ModelChoice, session: Session
) -> tuple[str, Agreement | None]:
    """Write the adapter alone, for llama.cpp to put on its base; as ``write_gguf_file``."""
    if choice.base is None:
        raise UsageError(f"{choice.name} is a whole model and no adapter", hint="export it with --to gguf")
    check_base(choice.folder, choice.base.folder)
    kind = cast("GgufType", request.dtype or "f32")
    alone = replace(choice, name=choice.base.name, folder=choice.base.folder, base=None)
    model = load_to_write(alone, session.emit, torch.float32)
    with storage.whole_file(request.out, hint=HINT, is_new=True) as fresh:
        storage.disk.let_library_write(
            fresh.parent,
            lambda: write_gguf_adapter(
                fresh, choice.folder, model, kind=kind, facts=_facts(choice), session=session
            ),
        )
        ids = compared_ids(choice, model)
        theirs = logits_with(model, ids, StoredChanges(fresh, model))
        load_adapter(model, choice.folder)
        merge_in_place(model)
        limit = logits_limit({FILE_TYPES[kind][0]})
        found = agreement(logits_with(model, ids, own_numbers), theirs, limit=limit)
        require_near(found, kind, request, session)
    return kind, found
