"""Loads the model that a run trains: whole, or where processes share its weights out, with these left in the files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.adapter import AdapterKind
from sftcli.config.schema.training import TrainingSettings
from sftcli.events import EventSink, Notice
from sftcli.modeling.formats.file_weights import FileWeights, WholeOnlyError
from sftcli.modeling.formats.source_tensors import SourceTensors
from sftcli.modeling.kernels.fuse import Fusion, fuse_layers
from sftcli.modeling.load import load_in_parts, load_model
from sftcli.services.models.base import tokenizer_folder
from sftcli.services.runs.record import Decisions
from sftcli.services.train.adapters import AdapterFiles, adapter_files, put_adapter, tell_left_alone
from sftcli.services.train.compiling import wants_compiled
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.distributed.group import Group
from sftcli.training.embeddings import freeze_embeddings
from sftcli.training.selection import select_weights
from sftcli.training.weights.sharded import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where and in which precision this process multiplies, with whom it trains, and how many of them hold a replica together."""

    device: torch.device
    dtype: torch.dtype
    group: Group
    shards: int = 1

    @property
    def shares(self) -> bool:
        """Whether this process holds a part of the weights only."""
        return self.shards > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, what its adapter's folders hold where one is trained, and the faster form of its layers.

    Its weights are in memory, or in ``files`` still.
    """

    model: "PreTrainedModel"
    source: SourceTensors  # of its folder
    adapter: AdapterFiles | None = None
    fusion: Fusion | None = None
    files: FileWeights | None = None


def load_for_training(
    inputs: TrainingInputs, recorded: Decisions, compute: Compute, emit: EventSink
) -> LoadedModel:
    """Return the model that ``inputs`` name as it is trained: what is frozen in it is, and its layers are in their faster form.

    Raises:
        SftError: As ``load_model``; or an adapter or a choice of weights does not fit to it.
    """
    settings, located = inputs.settings, inputs.located
    model, weights = _base(inputs, compute, emit)
    adapter = None
    if settings.adapter.is_on:
        with streamed(model, weights):
            added = put_adapter(model, located, settings.adapter)
        tell_left_alone(added.left_alone, settings.adapter, emit)
        adapter = adapter_files(
            model,
            added.config,
            settings=settings.model,
            located=located,
            tokenizer=inputs.prepared.tokenizer,
            tokenizer_source=tokenizer_folder(settings, located),
        )
    fusion = _fused(model, weights, inputs, recorded, compute, emit)
    if adapter is None:
        _freeze(model, settings.training, emit)
    return LoadedModel(
        model=model,
        source=SourceTensors.of(model, located.folder),
        adapter=adapter,
        fusion=fusion,
        files=weights,
    )


def _base(
    inputs: TrainingInputs, compute: Compute, emit: EventSink
) -> "tuple[PreTrainedModel, FileWeights | None]":
    """Return the model, and those of its weights that are in its files still: what is shared out has them there.

    What trains is in float32, and what an adapter is put on as products have it.
    """
    settings = inputs.settings
    folder, attention = inputs.located.folder, settings.model.attention
    checkpointing = settings.training.gradient_checkpointing
    dtype = compute.dtype if settings.adapter.is_on else torch.float32
    if compute.shares:
        try:
            _refuse_parts(inputs)
            return load_in_parts(
                folder,
                dtype=dtype,
                together=compute.group,
                attention=attention,
                checkpointing=checkpointing,
            )
        except WholeOnlyError as why:
            emit(Notice(text=f"each process loads the whole model before weights are shared out: {why}"))
    model = load_model(
        folder,
        dtype=dtype,
        device=torch.device("cpu") if compute.shares else compute.device,
        attention=attention,
        checkpointing=checkpointing,
        quantize=settings.adapter.quantize,
        trusts_code=bool(inputs.trusted_code),
    )
    return model, None


def _refuse_parts(inputs: TrainingInputs) -> None:
    if inputs.trusted_code:
        raise WholeOnlyError("it runs code of its folder")
    if inputs.settings.adapter.kind is AdapterKind.DORA:
        raise WholeOnlyError("DoRA begins with the norms of its weights")


def _freeze(model: "PreTrainedModel", training: TrainingSettings, emit: EventSink) -> None:
    """Leave as they are the weights of ``model`` that the settings name."""
    if not training.train_embeddings:
        freeze_embeddings(model)
    if training.train or training.freeze:
        selection = select_weights(model, train=training.train, freeze=training.freeze)
        emit(Notice(text=selection.in_words()))


@contextmanager
def streamed(
    model: "PreTrainedModel", files: FileWeights | None
) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Let ``model`` compute inside the block, wherever its weights are; yields ``hold`` as ``FileWeights.streamed`` does."""
    if files is None:
        yield lambda _: None
    else:
        with files.streamed(model, layers_of(model)) as hold:
            yield hold


def _fused(
    model: "PreTrainedModel",
    files: FileWeights | None,
    inputs: TrainingInputs,
    recorded: Decisions,
    compute: Compute,
    emit: EventSink,
) -> Fusion | None:
    """Fuse the layers of ``model``, if they are not to be compiled: our functions have no graph."""
    if recorded.layers == () or compiles(inputs.settings.training, recorded, compute):
        return None
    with streamed(model, files) as hold:
        fusion = fuse_layers(
            model,
            device=compute.device,
            has_adapter=inputs.settings.adapter.is_on,
            recorded=recorded.layers,
            hold=hold,
        )
    if fusion.left_alone:
        names = ", ".join(fusion.left_alone)
        emit(Notice(text=f"{names}: using the transformers implementation, not the faster one"))
    return fusion


def compiles(settings: TrainingSettings, recorded: Decisions, compute: Compute) -> bool:
    """Return whether the layers are to be compiled."""
    shares = compute.shares or compute.group.parts > 1
    return wants_compiled(settings.compile, compute.device, recorded.layers, shares=shares)
