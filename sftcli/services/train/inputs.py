"""What a run is made of: found, prepared, and good enough to train on."""

from sftcli.config.schema.settings import Settings
from sftcli.data.quality.thresholds import judge, left_out
from sftcli.errors import DataError, Location, StoppedError, UsageError
from sftcli.events import EventSink, StopFlag, Warned
from sftcli.modeling.formats.remote_code import allow_code
from sftcli.modeling.libraries import quiet_libraries
from sftcli.services.models.base import locate_base
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.prepare import prepare_data, require_rows
from sftcli.services.prepare.sources import find_sources
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.build import Materials
from sftcli.services.train.compatibility import fingerprints
from sftcli.services.train.requirements import check_machine


def find_materials(
    settings: Settings, emit: EventSink, stop: StopFlag, *, run: RunFolder | None = None
) -> Materials:
    """Find model and data; fill in the settings that depend on the rows. ``run`` names weights, and stands in for the cache."""
    quiet_libraries()
    check_machine(settings)
    sources = find_sources(settings.data)
    located = locate_base(settings.model, emit, run=run)
    if stop.requested():
        raise StoppedError
    prepared = prepare_data(
        settings.data,
        sources,
        model_folder=located.folder,
        seed=settings.training.seed,
        emit=emit,
        stop=stop,
        fallback=None if run is None else run.path / "cache",
    )
    require_rows(prepared)
    require_room(prepared, located.folder, emit)
    audits = list(prepared.audit.values())
    judge(audits, settings.data).require()
    if missing := left_out(audits):
        emit(Warned(text=str(missing)))
    if not len(prepared.dataset.train):
        raise DataError("there are only held-out rows, and none to train on", hint="name some with --data")
    if settings.training.early_stopping_evals and not len(prepared.dataset.heldout):
        raise UsageError(
            "training.early_stopping_evals needs held-out rows, and there are none",
            hint="set data.heldout_fraction, or name rows with --heldout",
            location=Location(key="training.early_stopping_evals"),
        )
    training = settings.training.for_rows(
        len(prepared.dataset.train), text_fraction=settings.data.text_fraction
    )
    settings = settings.model_copy(update={"training": training})
    trusted = (
        allow_code(located.folder, name=located.name, commit=located.revision, emit=emit)
        if settings.model.trust_remote_code
        else {}
    )
    return Materials(
        settings=settings,
        trusted_code=trusted,
        located=located,
        prepared=prepared,
        fingerprints=fingerprints(settings, located, prepared),
    )
