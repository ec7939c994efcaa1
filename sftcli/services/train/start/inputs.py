"""The inputs of a run: located, prepared, and checked."""

from collections.abc import Mapping
from dataclasses import dataclass

from sftcli.config.auto import ORIGIN, Decided
from sftcli.config.schema.settings import Settings
from sftcli.data.example import RowFlag
from sftcli.data.quality.thresholds import assess_rows, left_out
from sftcli.errors import DataError, Location, StoppedError, UsageError
from sftcli.events import Notice, Session, Warned
from sftcli.modeling.formats.remote_code import allow_code
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.services.models.base import locate_base, tokenizer_folder
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.prepare import PreparedData, prepare_data, require_rows
from sftcli.services.prepare.sources import find_sources
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resuming.compatibility import fingerprints
from sftcli.services.train.start.open_settings import decide, decided_text, doubts
from sftcli.services.train.start.requirements import check_machine


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """The inputs of a run. ``fingerprints`` identify them by content; computing them reads all weights."""

    settings: Settings  # complete: those that depend on the rows are filled in
    decided: Decided  # of those that nobody chose
    located: LocatedModel
    prepared: PreparedData
    fingerprints: Mapping[str, str]
    trusted_code: Mapping[str, str]  # what may run of the model's own code; empty for nothing

    @property
    def identity(self) -> Mapping[str, str]:
        """Hashes of what several processes must have alike."""
        return {name: self.fingerprints[name] for name in ("data", "tokenizer and template", "model")}

    @property
    def pad_id(self) -> int:
        """The token that fills rows up."""
        return self.prepared.tokenizer.pad_id

    def doubts(self) -> list[str]:
        """Return why this can hardly teach or prove anything."""
        rows, held = len(self.prepared.dataset.train), len(self.prepared.dataset.heldout)
        return list(doubts(self.decided.settings, self.settings, train_rows=rows, heldout_rows=held))


def find_inputs(settings: Settings, session: Session, *, run: RunFolder | None = None) -> TrainingInputs:
    """Find model and data; fill in the settings that depend on the rows. ``run`` names weights, and stands in for the cache."""
    quiet_libraries()
    check_machine(settings)
    sources = find_sources(settings.data)
    located = locate_base(settings.model, session.emit, run=run)
    if session.stop.requested():
        raise StoppedError
    prepared = prepare_data(
        settings.data,
        sources,
        model_folder=tokenizer_folder(settings, located),
        seed=settings.rows_seed,
        session=session,
        fallback=None if run is None else run.path / "cache",
    )
    require_rows(prepared)
    require_room(prepared, located.folder, session.emit)
    audits = list(prepared.audit.values())
    assess_rows(audits, settings.data).require()
    if missing := left_out(audits):
        session.emit(Warned(text=str(missing)))
    if rows := sum(audit.flags.get(RowFlag.STOP_TEXT.value, 0) for audit in audits):
        session.emit(
            Warned(
                text=f"in {rows} rows an answer ends in the text of a stop token, which is trained as text;"
                " --strip-stop-text takes it away"
            )
        )
    if not len(prepared.dataset.train):
        raise DataError("there are only held-out rows, none to train on", hint="name some with --data")
    if settings.training.early_stopping_evals and not len(prepared.dataset.heldout):
        raise UsageError(
            "training.early_stopping_evals needs held-out rows, and there are none",
            hint="set data.heldout_fraction, or name rows with --heldout",
            location=Location(key="training.early_stopping_evals"),
        )
    decided = decide(settings, prepared, located)
    if (text := decided_text(decided)) != ORIGIN:  # epochs say nothing where steps were asked for
        session.emit(Notice(text=text))
    settings = decided.settings
    training = settings.training.for_rows(
        len(prepared.dataset.train), text_fraction=settings.data.text_fraction
    )
    settings = settings.model_copy(update={"training": training})
    trusted = (
        allow_code(located.folder, name=located.name, commit=located.revision, emit=session.emit)
        if settings.model.trust_remote_code
        else {}
    )
    return TrainingInputs(
        settings=settings,
        decided=decided,
        trusted_code=trusted,
        located=located,
        prepared=prepared,
        fingerprints=fingerprints(settings, located, prepared),
    )
