"""Numbers of a run in Weights & Biases."""

import os
import secrets
from collections.abc import Mapping

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.errors import UsageError
from sftcli.services.runs.folder import RunFolder
from sftcli.services.trackers.base import PROJECT, flat_settings, kept_id

_WANDB_SECONDS = 20.0  # the longest that a start may wait for the service


class WandbNumbers:
    """A run of Weights & Biases; its files are in ``RUN/trackers``. ``WANDB_MODE=offline`` keeps them there."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise UsageError("not logged in", hint="run wandb login, or set WANDB_MODE=offline")
        storage.make_folders(run.trackers)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow" if after_step >= 0 else None,
            dir=str(run.trackers),
            config=flat_settings(settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # the command line and the name of this machine
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=_WANDB_SECONDS,
            ),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()
