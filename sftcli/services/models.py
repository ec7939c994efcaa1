"""What a user may name where a model to ask or score is wanted: a run, a checkpoint, a folder, or any model name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema import ModelSettings
from sftcli.events import EventSink, ModelLoaded, Notice
from sftcli.modeling.adapter_folder import is_adapter_folder
from sftcli.modeling.fused_decode import fuse
from sftcli.modeling.load import count_parameters, load_model, quiet_libraries
from sftcli.modeling.locate import LocatedModel, locate_model
from sftcli.runtime import choose_device, choose_dtype, dtype_name
from sftcli.services.adapters import locate_adapter_base
from sftcli.services.base_model import locate_base
from sftcli.services.run_folder import RunFolder, newest_run
from sftcli.training.checkpoint_names import list_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """A model folder, and the run that made it where it comes from one.

    ``folder`` may be an adapter's; ``base`` is then the model that it belongs to. ``load_choice`` loads either.
    """

    name: str
    folder: Path
    run: RunFolder | None
    base: LocatedModel | None = None

    @property
    def weights_folder(self) -> Path:
        """The folder with the model's configuration and weights: of an adapter, those of its base."""
        return self.folder if self.base is None else self.base.folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and template: of an adapter that brings none, those of its base."""
        return self.folder if (self.folder / "tokenizer.json").is_file() else self.weights_folder


def choose_model(
    reference: str | None, *, root: Path, emit: EventSink, tokenizer: str | None = None
) -> ModelChoice:
    """Return what ``reference`` names: by default the newest finished run's final model.

    A run (by name or path) means its final model, or its newest checkpoint while it is unfinished. Else ``reference`` is
    the folder of a model or checkpoint, or a model name as ``train`` takes it.

    Raises:
        NotFoundError: Nothing is there.
    """
    if reference is None:
        run = newest_run(root, finished=True)
        emit(Notice(text=f"using {run.final}"))
        return _choice(run.name, run.final, run, emit)
    for path in (root / reference, Path(reference)):
        if (path / "run.json").is_file():
            run = RunFolder(path)
            return _choice(run.name, _newest_model(run), run, emit)
        if (path / "config.json").is_file() or is_adapter_folder(path):
            return _choice(reference, path, _owner(path), emit)
    located = locate_model(reference, revision=None, tokenizer=tokenizer, emit=emit)
    return ModelChoice(name=located.name, folder=located.folder, run=None)


def _choice(name: str, folder: Path, run: RunFolder | None, emit: EventSink) -> ModelChoice:
    base = locate_adapter_base(folder, emit) if is_adapter_folder(folder) else None
    return ModelChoice(name=name, folder=folder, run=run, base=base)


def choose_base(settings: ModelSettings, emit: EventSink, *, run: RunFolder | None = None) -> ModelChoice:
    """Return the model that ``run``, of these settings, starts from, to be asked or scored."""
    located = locate_base(settings, emit, run=run)
    return ModelChoice(name=located.name, folder=located.folder, run=None)


def base_of(choice: ModelChoice, settings: ModelSettings | None, emit: EventSink) -> ModelChoice | None:
    """Return the model that ``choice`` was made from: by its run's settings, or the base of its adapter."""
    if settings is not None:
        return choose_base(settings, emit, run=choice.run)
    if choice.base is None:
        return None
    return ModelChoice(name=choice.base.name, folder=choice.base.folder, run=None)


def load_choice(choice: ModelChoice, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a model whole, in evaluation mode; an adapter is merged into its base, in float32 and rounded once.

    Raises:
        MismatchError: The base is not the model that the adapter was trained on.
    """
    if choice.base is None:
        return load_model(choice.folder, dtype=dtype, device=device)
    from sftcli.modeling.adapter import merge_adapter

    return merge_adapter(choice.folder, base=choice.base.folder, dtype=dtype, device=device)


def load_for_inference(choice: ModelChoice, *, precision: str, emit: EventSink) -> "PreTrainedModel":
    """Load a model for generating or scoring, in evaluation mode."""
    quiet_libraries()
    device = choose_device()
    dtype = choose_dtype(precision, device)
    model = load_choice(choice, dtype=dtype, device=device)
    fuse(model)
    total, _ = count_parameters(model)
    emit(
        ModelLoaded(
            name=choice.name, parameters=total, trainable=0, device=str(device), precision=dtype_name(dtype)
        )
    )
    return model


def _newest_model(run: RunFolder) -> Path:
    checkpoints = list_checkpoints(run.checkpoints)
    return run.final if run.is_finished or not checkpoints else checkpoints[-1]


def _owner(path: Path) -> RunFolder | None:
    """Return the run that a model folder lies in: RUN/final or RUN/checkpoints/STEP."""
    for parent in list(path.resolve().parents)[:2]:
        if (parent / "run.json").is_file():
            return RunFolder(parent)
    return None
