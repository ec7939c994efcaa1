"""Adapters of runs: put a new one into a model that is loaded for training, and leave its folder behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli import storage
from sftcli.config.schema.adapter import AUTO_TARGETS, AdapterSettings
from sftcli.config.schema.run import ModelSettings
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.adapter.adapter import AddedAdapter, add_adapter, check_base, set_adapter
from sftcli.modeling.adapter.folder import (
    WEIGHTS_FILE,
    AdapterBase,
    write_adapter_config,
)
from sftcli.modeling.adapter.targets import EXPERTS, ROUTERS, LeftAlone
from sftcli.modeling.formats.folder_write import write_companions
from sftcli.modeling.formats.identity import numbers_hash
from sftcli.modeling.formats.stored_tensors import tensor_file_parts
from sftcli.modeling.formats.written import check_file_written
from sftcli.modeling.hub.snapshot import is_commit
from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME
from sftcli.modeling.locate.locate import LocatedModel, is_path
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.paths import as_path
from sftcli.training.state import TrainingSnapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MUCH = 0.05  # of the weights of the layers


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """The files of an adapter folder besides its weights."""

    config: dict[str, object]
    base: AdapterBase
    model: "PreTrainedModel"
    source: Path  # folder whose tokenizer files are copied
    tokenizer: HFChatTokenizer

    def write(self, folder: Path) -> None:
        """Write the configuration, the base's name and content, and the tokenizer with its template."""
        write_adapter_config(folder, self.config, self.base)
        write_companions(
            self.model,
            folder,
            source=self.source,
            stop_ids=self.tokenizer.stop_ids,
            template=self.tokenizer.chosen_template,
        )

    def save(self, folder: Path, snapshot: TrainingSnapshot) -> None:
        """Write a folder that plain peft opens, atomically.

        Raises:
            StorageError: The disk is full.
            OutputError: The place is not writable.
        """
        with storage.atomic_folder(folder, hint="choose another run.root") as fresh:
            storage.write_file(fresh / WEIGHTS_FILE, tensor_file_parts(snapshot.weights))
            check_file_written(fresh / WEIGHTS_FILE, snapshot.weights)
            self.write(fresh)


def put_adapter(model: "PreTrainedModel", located: LocatedModel, settings: AdapterSettings) -> AddedAdapter:
    """Put an adapter that trains into ``model``, which is ``located``: a new one, or one to go on from.

    Give the model ``AdapterWeights``: there is no float32 copy of it, only the adapter has masters.

    Raises:
        MismatchError: The adapter to go on from was trained on other weights, or is of another shape.
    """
    added = add_adapter(model, settings, new_ids=[*located.new_tokens.values()])
    if settings.start_from is not None:
        check_base(Path(settings.start_from), located.folder)
        set_adapter(model, Path(settings.start_from))
    return added


def adapter_files(
    model: "PreTrainedModel",
    config: dict[str, object],
    *,
    settings: ModelSettings,
    located: LocatedModel,
    tokenizer: HFChatTokenizer,
    tokenizer_source: Path,
) -> AdapterFiles:
    """Return what the folders of a run's adapter hold.

    peft is told the base's name on the hub where it has one; ``sft_base.json`` has the name that the user gave. A folder or
    file is named by its whole path.
    """
    revision = located.revision if is_commit(located.revision) else None
    # A path that was typed means something else, or nothing, in another working folder.
    own_name = str(as_path(located.name).absolute()) if is_path(located.name) else located.name
    name = HUB_NAME if located.name == ALIAS else own_name
    base = AdapterBase(
        name=own_name,
        # A folder is known by its content: its configuration may be written anew by another release of a library.
        revision=located.revision if revision or located.name == ALIAS else None,
        tokenizer=settings.tokenizer,
        content=numbers_hash(located.folder),
        new_tokens=tuple(located.new_tokens),
    )
    return AdapterFiles(
        config={"base_model_name_or_path": name, "revision": revision, **config},
        base=base,
        model=model,
        source=tokenizer_source,
        tokenizer=tokenizer,
    )


def tell_left_alone(alone: LeftAlone, settings: AdapterSettings, emit: EventSink) -> None:
    """Say what ``auto`` leaves without an adapter; warn where that is much."""
    if AUTO_TARGETS not in settings.target_modules or not alone.kinds:
        return
    kinds = [f"{kind} {_percent(share)}" for kind, share in alone.kinds.items() if kind != ROUTERS]
    kinds = [*kinds[:3], *(["other weights"] if kinds[3:] else [])]
    if ROUTERS in alone.kinds:
        kinds.append(f"{ROUTERS} of experts {_percent(alone.kinds[ROUTERS])}")
    text = f"LoRA: {_percent(alone.share)} of the layer weights have no adapter: {', '.join(kinds)}"
    if EXPERTS in alone.kinds and not settings.experts:
        text += "; adapter.experts=true gives the experts one"
    emit(Warned(text=text) if alone.share >= _MUCH else Notice(text=text))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"
