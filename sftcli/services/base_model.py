"""The model that a run starts from. Apart from ``models``, because preparing rows needs its folder and no torch."""

from sftcli.config.schema import ModelSettings
from sftcli.events import EventSink
from sftcli.modeling.hub import is_commit
from sftcli.modeling.locate import LocatedModel, locate_model
from sftcli.services.run_folder import RunFolder, write_json

_BASE = "base"  # key in run.json


def locate_base(settings: ModelSettings, emit: EventSink, *, run: RunFolder | None = None) -> LocatedModel:
    """Return the folder of the model that a run of these settings starts from.

    Of a hub model it is the commit that ``run`` started from, where that is known: what its name means may have moved on.
    """
    return locate_model(
        settings.name,
        revision=_known_commit(run, settings) or settings.revision,
        tokenizer=settings.tokenizer,
        emit=emit,
        with_code=settings.trust_remote_code,
    )


def record_base(run: RunFolder, located: LocatedModel) -> None:
    """Write into ``run.json`` which weights the run starts from."""
    write_json(run.about, run.read_about() | {_BASE: {"name": located.name, "revision": located.revision}})


def _known_commit(run: RunFolder | None, settings: ModelSettings) -> str | None:
    base = run.read_about().get(_BASE) if run is not None and run.about.is_file() else None
    if not isinstance(base, dict) or base.get("name") != settings.name:
        return None
    revision = base.get("revision")
    return revision if isinstance(revision, str) and is_commit(revision) else None
