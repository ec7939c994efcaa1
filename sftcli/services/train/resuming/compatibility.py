"""Fingerprints of a run's inputs, and the check whether they have changed."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.modeling.adapter.folder import WEIGHTS_FILE
from sftcli.modeling.formats.identity import exact_hash
from sftcli.modeling.locate.locate import LocatedModel
from sftcli.services.machine.facts import facts_of_training
from sftcli.services.prepare.prepare import PreparedData
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resuming.changes import MACHINE, START, Changes, find_changes, named_settings
from sftcli.training.checkpoint.format import read_fingerprints


def fingerprints(settings: Settings, located: LocatedModel, prepared: PreparedData) -> dict[str, str]:
    """Return the fingerprints of a run by name: every setting, and hashes of the data, the tokenizer and the model."""
    machine = {f"{MACHINE}{name}": value for name, value in facts_of_training(settings.training).items()}
    return (
        named_settings(settings)
        | machine
        | {
            "data": prepared.dataset.fingerprint,
            "data rows": f"{len(prepared.dataset.train)} + {len(prepared.dataset.heldout)} held out",
            "tokenizer and template": hashlib.sha256(
                str(prepared.tokenizer.fingerprint).encode()
            ).hexdigest(),
            "model": exact_hash(located.folder),
        }
        | _start(settings)
    )


def _start(settings: Settings) -> dict[str, str]:
    folder = settings.adapter.start_from
    return {} if folder is None else {START: storage.file_sha256(Path(folder) / WEIGHTS_FILE)}


def compare(
    checkpoint: Path,
    now: Mapping[str, str],
    *,
    allowed: Sequence[str] = (),
    finished: RunFolder | None = None,
) -> Changes:
    """Return what has changed since ``checkpoint``.

    Args:
        checkpoint: It holds what it was made of.
        now: What ``fingerprints`` returns.
        allowed: Settings keys, or ``data``, of which the user says that they may differ.
        finished: The run, if it does not go on, so that nothing is said of how it would.

    Raises:
        MismatchError: Anything else differs that moves weights; each difference is shown.
    """
    then = read_fingerprints(checkpoint)
    return find_changes(then, now, allowed=allowed, what=str(checkpoint), finished=finished)


def compare_data(run: RunFolder, fingerprint: str, *, allowed: Sequence[str] = ()) -> None:
    """Make sure that the rows of a run that starts over are those that it had prepared.

    Raises:
        MismatchError: They are others.
    """
    then = run.data_fingerprint()
    if then is not None:
        find_changes({"data": then}, {"data": fingerprint}, allowed=allowed, what="the run")
