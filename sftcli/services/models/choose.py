"""What a user may name as the model to generate with or evaluate: a run, a checkpoint, a folder, or any model name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.run import Attention
from sftcli.config.schema.settings import Settings
from sftcli.events import EventSink, ModelLoaded, Notice, Warned
from sftcli.modeling.adapter.folder import is_adapter_folder, read_base
from sftcli.modeling.formats.folder_write import stored_dtype
from sftcli.modeling.formats.remote_code import allow_code, allow_copied_code
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.load import count_parameters, load_model, own_attention
from sftcli.modeling.locate.locate import LocatedModel, locate_model
from sftcli.runtime import choose_device, choose_dtype, dtype_name
from sftcli.services.models.base import locate_adapter_base, locate_base, own_tokenizer
from sftcli.services.models.reference import find_model
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.training.checkpoint.format import verify_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """A model folder, and the run that made it where it comes from one.

    ``folder`` may be an adapter's; ``base`` is then the model that it belongs to. ``load_choice`` loads either. With
    ``runs_code`` the model's own code runs, which was looked through and told of.
    """

    name: str
    folder: Path
    run: RunFolder | None
    base: LocatedModel | None = None
    runs_code: bool = False

    @property
    def attention(self) -> Attention:
        """The attention to answer and score with: that of the run, if it was named and works on any machine."""
        named = Attention.AUTO if self.run is None else read_settings(self.run).model.attention
        return Attention.AUTO if named.needs_cuda else named

    @property
    def weights_folder(self) -> Path:
        """The folder with the model's configuration and weights: of an adapter, those of its base."""
        return self.folder if self.base is None else self.base.folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and template: of an adapter that brings none, those of its base."""
        return own_tokenizer(self.folder) or self.weights_folder


def choose_model(
    reference: str | None,
    *,
    root: Path,
    emit: EventSink,
    tokenizer: str | None = None,
    trusts_code: bool = False,
    base_model: str | None = None,
) -> ModelChoice:
    """Return what ``reference`` names: by default the newest finished run's final model.

    A run (by name or path) means its final model, or its newest checkpoint while it is unfinished. Else ``reference`` is
    the folder of a model or checkpoint, or a model name as ``train`` takes it. ``trusts_code`` lets the code run that a run
    was trained with. ``base_model`` is where the base of an adapter is, if not where the adapter says.

    Raises:
        NotFoundError: Nothing is there.
        DataError: A part of a checkpoint is not the one that was saved there.
        ConsentError: The code is not that of the run.
        UsageError: Code is trusted of a model that no run has made, or a base is named of a model that is no adapter.
    """
    found = find_model(
        reference, root=root, tokenizer=tokenizer, trusts_code=trusts_code, base_model=base_model
    )
    if found.folder is None:
        located = locate_model(found.name, revision=None, tokenizer=tokenizer, emit=emit)
        return ModelChoice(name=located.name, folder=located.folder, run=None)
    name, folder, run = found.name, found.folder, found.run
    verify_model(folder)
    if found.fault:
        emit(
            Warned(
                text=f"{found.fault}; {folder} is used without what its run says of it: its base, rows, scores and stop tokens"
            )
        )
    if reference is None:
        emit(Notice(text=f"using {folder}"))
    if found.is_adapter:
        base = locate_adapter_base(folder, emit, with_code=trusts_code, named=base_model)
        runs_code = trusts_code and _may_run_code(base, emit)
        return ModelChoice(name=name, folder=folder, run=run, base=base, runs_code=runs_code)
    runs_code = False
    if trusts_code and run is not None:
        runs_code = allow_copied_code(folder, trusted=run.record().trusted_code, emit=emit)
    return ModelChoice(name=name, folder=folder, run=run, runs_code=runs_code)


def _may_run_code(located: LocatedModel, emit: EventSink) -> bool:
    return bool(allow_code(located.folder, name=located.name, commit=located.revision, emit=emit))


def base_of(
    choice: ModelChoice, emit: EventSink, *, trusts_code: bool = False, named: str | None = None
) -> ModelChoice | None:
    """Return the model that ``choice`` was made from: what its run started from, or the base of its adapter.

    The latter counts where the user has ``named`` it.
    """
    if choice.run is not None and named is None:
        settings = read_settings(choice.run).model.model_copy(update={"trust_remote_code": trusts_code})
        located = locate_base(settings, emit, run=choice.run)
        runs_code = trusts_code and _may_run_code(located, emit)
    elif choice.base is not None:
        located, runs_code = choice.base, choice.runs_code
    else:
        return None
    verify_model(located.folder)
    return ModelChoice(name=located.name, folder=located.folder, run=None, runs_code=runs_code)


def start_of(settings: Settings, emit: EventSink) -> ModelChoice:
    """Return the model that a training of ``settings`` starts from: the base, or the adapter that it goes on from."""
    located = locate_base(settings.model, emit)
    runs_code = settings.model.trust_remote_code and _may_run_code(located, emit)
    adapter = settings.adapter.start_from
    if adapter is None:
        return ModelChoice(name=located.name, folder=located.folder, run=None, runs_code=runs_code)
    return ModelChoice(name=adapter, folder=Path(adapter), run=None, base=located, runs_code=runs_code)


def recorded_base(choice: ModelChoice) -> tuple[str, str | None]:
    """Return name and revision of the model that ``choice`` was tuned from, as its run or its adapter has them; "" for neither."""
    if choice.run is not None:
        base = choice.run.record().base
        return read_settings(choice.run).model.name, None if base is None else base.revision
    if is_adapter_folder(choice.folder):
        adapted = read_base(choice.folder)
        return adapted.name, adapted.revision
    return "", None


def load_choice(choice: ModelChoice, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a full model, in evaluation mode; an adapter is merged into its base, in float32 and rounded once.

    Raises:
        MismatchError: The base is not the model that the adapter was trained on.
    """
    if choice.base is None:
        return load_model(
            choice.folder,
            dtype=dtype,
            device=device,
            attention=choice.attention,
            trusts_code=choice.runs_code,
        )
    from sftcli.modeling.adapter.adapter import merge_adapter

    return merge_adapter(
        choice.folder,
        base=choice.base.folder,
        dtype=dtype,
        device=device,
        attention=choice.attention,
        trusts_code=choice.runs_code,
    )


def handed_on_dtype(choice: ModelChoice) -> torch.dtype:
    """Return the default dtype of an exported model, which rounds nothing.

    A whole model keeps the dtype it is stored in. An adapter's sums with its base are float32, as peft makes them: what
    a short training adds to a bfloat16 matrix is often no larger than a step of bfloat16. So the numbers of ``sft eval``,
    which computes in float32, are those of what ``sft export`` writes.
    """
    return stored_dtype(choice.folder) if choice.base is None else torch.float32


def load_for_inference(choice: ModelChoice, *, precision: str, emit: EventSink) -> "PreTrainedModel":
    """Load a model for generating or scoring, in evaluation mode."""
    quiet_libraries()
    device = choose_device()
    dtype = choose_dtype(precision, device)
    model = load_choice(choice, dtype=dtype, device=device)
    total, _ = count_parameters(model)
    emit(
        ModelLoaded(
            name=choice.name, parameters=total, trainable=0, device=str(device), precision=dtype_name(dtype)
        )
    )
    if message := own_attention(model):
        emit(Notice(text=message))
    return model
