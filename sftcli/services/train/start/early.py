"""What names and numbers decide about a training, said before torch is loaded and before a folder is made."""

from collections.abc import Sequence
from pathlib import Path

from sftcli.config.schema.settings import Settings
from sftcli.data.conversations.fixes import read_fixes
from sftcli.events import unheard
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.modeling.tokenizer.chat_tokenizer import named_template
from sftcli.paths import as_path
from sftcli.services.models.reference import check_model_name
from sftcli.services.prepare.sources import find_sources
from sftcli.services.runs.event_log import is_unstarted
from sftcli.services.runs.folder import Recorded, RunFolder, existing_run, require_free
from sftcli.services.runs.lineage import require_earlier
from sftcli.services.runs.lock import RunLock
from sftcli.services.train.resuming.changes import check_may_change
from sftcli.services.train.resuming.kept import checkpoint_of, pair_to_verify
from sftcli.services.train.resuming.longer import asks_longer
from sftcli.services.train.start.disk_space import check_space, checkpoint_bytes
from sftcli.services.train.start.requirements import check_machine, check_trackers
from sftcli.services.train.start.servers import require_served


def check_inputs(settings: Settings) -> None:
    """Find model, rows and template by name, and what the machine needs; nothing is fetched.

    Raises:
        UsageError, NotFoundError, ConsentError, DataError, ResourceError: Something is not there.
    """
    check_machine(settings)
    require_served(settings)
    require_earlier(settings)
    find_sources(settings.data)  # a slip in a name is told before torch is loaded
    if settings.data.fixes is not None:
        read_fixes(settings.data.fixes)
    if settings.data.template is not None:
        named_template(settings.data.template)
    model = settings.model
    check_model_name(
        model.name, root=Path(settings.run.root), revision=model.revision, tokenizer=model.tokenizer
    )


def check_asked(settings: Settings) -> None:
    """Check what a new run of ``settings`` would start from, without its name and place.

    Raises:
        UsageError, NotFoundError, ConsentError, DataError, ResourceError: As ``check_inputs``, or a tracker is not installed.
    """
    check_trackers(settings.run)
    check_inputs(settings)


def check_start(settings: Settings, *, auto: bool) -> None:
    """Check what a new run needs. With ``auto`` a run of its name goes on.

    Raises:
        UsageError, NotFoundError, ConsentError, DataError, ResourceError: As ``check_asked``.
        OutputError: The run exists, or its folder cannot be made, or another process trains it.
        StorageError: The disk has no room for its checkpoints.
    """
    existing = existing_run(settings.run) if auto else None
    check_asked(settings)
    if existing is not None and not existing.is_finished:
        RunLock(existing.path, unheard).require_free()
    if existing is None and not is_unstarted(settings.run):
        require_free(settings.run)
        _check_room(settings)


def _check_room(settings: Settings) -> None:
    """Make sure that there is room for checkpoints where the model is a folder; of others the size is not known yet."""
    folder = as_path(settings.model.name)
    if settings.model.name != ALIAS and folder.is_dir():
        run = RunFolder(Path(settings.run.root) / (settings.run.name or "run"))
        check_space(
            run, checkpoint_bytes(settings, folder), settings.checkpoint, unheard
        )  # told when the run is there


def check_resume(
    recorded: Recorded, *, step: int | None, verify: bool, allowed: Sequence[str], breaks_lock: bool
) -> None:
    """Check what resuming or verifying a run needs.

    Raises:
        UsageError, NotFoundError, ConsentError, DataError, ResourceError: As ``check_inputs``, or there is no such checkpoint,
            or what is allowed to change cannot.
        OutputError: Another process trains the run.
    """
    check_may_change(allowed)
    if verify:
        pair_to_verify(recorded.run, step)
    elif step is not None:
        checkpoint_of(recorded.run, step)
    elif recorded.run.is_finished and not asks_longer(recorded, allowed):
        return
    if not (verify or breaks_lock):
        RunLock(recorded.run.path, unheard).require_free()
    check_inputs(recorded.settings)
