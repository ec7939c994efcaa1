"""Numbers of a run as event files of TensorBoard."""

from collections.abc import Mapping

from sftcli.config.schema.settings import Settings
from sftcli.services.runs.folder import RunFolder
from sftcli.services.trackers.base import flat_settings


class TensorBoardNumbers:
    """Event files in ``RUN/trackers/tensorboard``; on resume, later steps of the old ones are no longer shown."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.trackers / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=after_step + 1 if after_step >= 0 else None)
        rows = "\n".join(f"| {key} | {value} |" for key, value in flat_settings(settings).items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()
