"""The inputs of a run: located, prepared, and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sftcli.config.auto import Decided, unusual_rate, with_values
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import BestBy, TrainingSettings
from sftcli.data.example import RowFlag
from sftcli.data.quality.thresholds import assess_rows, left_out
from sftcli.errors import DataError, Location, StoppedError, UsageError
from sftcli.events import EventSink, Notice, Session, Warned
from sftcli.modeling.formats.remote_code import allow_code
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.services.models.base import locate_base, tokenizer_folder
from sftcli.services.prepare.capacity import require_room
from sftcli.services.prepare.prepare import PreparedData, prepare_rows, require_rows
from sftcli.services.prepare.sources import find_sources
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.lineage import require_earlier
from sftcli.services.train.earlier.rows import EarlierRows, find_earlier
from sftcli.services.train.resuming.changes import REPLAYED_ROWS, named_settings
from sftcli.services.train.resuming.compatibility import fingerprints
from sftcli.services.train.start.open_settings import decide, decided_text, doubts, parameters_of
from sftcli.services.train.start.requirements import check_machine
from sftcli.services.train.start.servers import require_served, require_served_model
from sftcli.training.checkpoint.format import verify_model


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """The inputs of a run. ``fingerprints`` identify them by content; computing them reads all weights."""

    settings: Settings  # complete: those that depend on the rows are filled in
    decided: Decided  # of those that nobody chose
    located: LocatedModel
    prepared: PreparedData  # replayed rows among it
    earlier: EarlierRows | None = None  # of the runs that it trains on from, if any
    fingerprints: Mapping[str, str]
    trusted_code: Mapping[str, str]  # what may run of the model's own code; empty for nothing

    @property
    def identity(self) -> Mapping[str, str]:
        """Hashes of what several processes must have alike."""
        names = ("data", "tokenizer and template", "model", REPLAYED_ROWS)
        return {name: self.fingerprints[name] for name in names if name in self.fingerprints}

    @property
    def pad_id(self) -> int:
        """The token that fills rows up."""
        return self.prepared.tokenizer.pad_id

    def tell_doubts(self, emit: EventSink, *, with_replay: str) -> None:
        """Emit why this can hardly teach or prove anything, or may lose something, and what is unusual about it and may be meant.

        ``with_replay`` is what mixes rows of earlier runs in.
        """
        rows, held = len(self.prepared.dataset.train), len(self.prepared.dataset.heldout)
        is_timed = "training.max_minutes" in self.decided.origins
        replayed = 0 if self.earlier is None else self.earlier.replayed
        for text in doubts(
            self.decided.settings,
            self.settings,
            train_rows=rows,
            heldout_rows=held,
            replayed_rows=replayed,
            is_timed=is_timed,
        ):
            emit(Warned(text=text))
        if self.earlier is not None and not self.settings.data.replay:
            emit(Warned(text=f"{self.earlier.doubt()}: {with_replay}"))
        for text in unusual_rate(self.settings, parameters_of(self.located)):
            emit(Notice(text=text))

    def ending_at(self, steps: int, origin: str) -> "TrainingInputs":
        """Return these with the time that the training may take turned into ``steps``, which come from ``origin``."""
        training = self.settings.training.ending_at(steps)
        settings = self.settings.model_copy(update={"training": training})
        of_time = {"training.max_steps": training.max_steps, "training.max_minutes": training.max_minutes}
        decided = Decided(
            settings=with_values(self.decided.settings, of_time),
            origins={**self.decided.origins, **dict.fromkeys(of_time, origin)},
        )
        named = {**self.fingerprints, **named_settings(settings)}
        return replace(self, settings=settings, decided=decided, fingerprints=named)


def find_inputs(settings: Settings, session: Session, *, run: RunFolder | None = None) -> TrainingInputs:
    """Find model and data; fill in the settings that depend on the rows. ``run`` names weights, and stands in for the cache."""
    quiet_libraries()
    check_machine(settings)
    require_earlier(settings)
    sources = find_sources(settings.data)
    require_served(settings)
    located = locate_base(settings.model, session.emit, run=run)
    verify_model(located.folder)
    require_served_model(settings, located.folder, session.emit)
    if session.stop.requested():
        raise StoppedError
    prepared = prepare_rows(
        settings,
        sources=sources,
        model_folder=tokenizer_folder(settings, located),
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
    if not len(prepared.dataset.heldout) and (key := _needs_heldout(settings.training)):
        raise UsageError(
            f"{key} needs held-out rows, and there are none",
            hint="set data.heldout_fraction, or name rows with --heldout",
            location=Location(key=key),
        )
    decided = decide(settings, prepared, located)
    if chosen := decided_text(decided):
        session.emit(Notice(text=chosen))
    settings = decided.settings
    earlier = find_earlier(settings, prepared, session, run=run)
    if earlier is not None and earlier.replayed:
        prepared = earlier.joined_to(prepared)
        session.emit(Notice(text=earlier.in_words(len(prepared.dataset.train))))
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
        earlier=earlier,
        fingerprints=fingerprints(settings, located, prepared)
        | ({} if earlier is None else earlier.fingerprints),
    )


def _needs_heldout(training: TrainingSettings) -> str:
    """Return a setting that asks for what held-out rows alone can give; nothing where there is none."""
    asked = {
        "training.early_stopping_evals": training.early_stopping_evals > 0,
        "training.metric_for_best": training.metric_for_best is not BestBy.LOSS,
        "training.eval_answers": bool(training.eval_answers),
    }
    return next((key for key, is_asked in asked.items() if is_asked), "")
