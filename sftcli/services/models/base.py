"""The model that a run starts from. Apart from ``choose``, because preparing rows needs its folder and no torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sftcli.config.schema.run import ModelSettings
from sftcli.config.schema.settings import Settings
from sftcli.errors import NetworkError, NotFoundError
from sftcli.events import EventSink
from sftcli.modeling.adapter.folder import CONFIG_FILE, read_base, read_new_tokens
from sftcli.modeling.hub.snapshot import is_commit
from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME
from sftcli.modeling.locate.locate import LocatedModel, locate_model
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.record import Base


def locate_base(settings: ModelSettings, emit: EventSink, *, run: RunFolder | None = None) -> LocatedModel:
    """Return the folder of the model that a run of these settings starts from, with the tokens that they add.

    Of a hub model it is the commit that ``run`` started from, where that is known: what its name means may have moved on.
    """
    located = locate_model(
        settings.name,
        revision=_known_commit(run, settings) or settings.revision,
        tokenizer=settings.tokenizer,
        emit=emit,
        with_code=settings.trust_remote_code,
    )
    return _extended(located, settings.new_tokens, emit)


def _extended(located: LocatedModel, tokens: Sequence[str], emit: EventSink) -> LocatedModel:
    if not tokens:
        return located
    from sftcli.modeling.new_tokens import with_new_tokens

    return with_new_tokens(located, tokens, emit)


def own_tokenizer(folder: Path) -> Path | None:
    """Return ``folder`` if it holds a tokenizer, which that of an adapter may or may not."""
    return folder if (folder / "tokenizer.json").is_file() else None


def tokenizer_folder(settings: Settings, located: LocatedModel) -> Path:
    """Return where the tokenizer and template of a run are: with the adapter that it goes on from, or with its base."""
    start = settings.adapter.start_from
    return located.folder if start is None else own_tokenizer(Path(start)) or located.folder


def record_base(run: RunFolder, located: LocatedModel) -> None:
    """Write into ``run.json`` which weights the run starts from."""
    run.note(base=Base(name=located.name, revision=located.revision))


def record_need(run: RunFolder) -> None:
    """Record in ``run.json`` that exporting a checkpoint needs the model that the run started from."""
    run.note(base=replace(run.record().base or Base(), needed=True))


def needed_base(run: RunFolder, emit: EventSink) -> LocatedModel | None:
    """Return the model that ``run`` started from if exporting its checkpoints needs it.

    Raises:
        NotFoundError: It is not there any more.
    """
    base = run.record().base
    if base is None or not base.needed:
        return None
    return locate_base(read_settings(run).model, emit, run=run)


def _known_commit(run: RunFolder | None, settings: ModelSettings) -> str | None:
    base = run.record().base if run is not None and run.about.is_file() else None
    if base is None or base.name != settings.name:
        return None
    return base.revision if base.revision is not None and is_commit(base.revision) else None


def locate_adapter_base(
    folder: Path, emit: EventSink, *, with_code: bool = False, named: str | None = None
) -> LocatedModel:
    """Return the model that the adapter in ``folder`` belongs to, with the tokens that it was given for it.

    ``named`` is where a user says that the model is.

    Raises:
        NotFoundError: It is not where the adapter says.
        NetworkError: The adapter says that it is on the hub, which cannot be asked.
    """
    tokens = read_new_tokens(folder)
    if named is not None:
        located = locate_model(named, revision=None, emit=emit, with_code=with_code)
        return _extended(located, tokens, emit)
    base = read_base(folder)
    try:
        located = locate_model(
            base.name, revision=base.revision, tokenizer=base.tokenizer, emit=emit, with_code=with_code
        )
    except NotFoundError as error:
        raise NotFoundError(
            f"the adapter {folder} has a base model that was not found: {error.message}",
            hint=f"name it: --base-model MODEL; or set its new location in {folder}: name in sft_base.json, or "
            f"base_model_name_or_path in {CONFIG_FILE}",
        ) from error
    except NetworkError as error:
        raise NetworkError(
            f"the adapter {folder} has the base model {base.name}, which is not available: {error.message}",
            hint=_hint_of(base.name),
        ) from error
    return _extended(located, tokens, emit)


def _hint_of(name: str) -> str:
    """Return what to do where the hub cannot be asked for a base."""
    if name == HUB_NAME:
        return f"name a copy of it: --base-model {ALIAS} is the one that sft trains, with slightly different weights"
    return "name a local copy of it: --base-model MODEL"
