"""Numbers of a run in MLflow."""

import os
from collections.abc import Mapping

from sftcli.config.schema.settings import Settings
from sftcli.services.runs.folder import RunFolder
from sftcli.services.trackers.base import PROJECT, flat_settings, kept_id


class MlflowNumbers:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, run: RunFolder, settings: Settings, *, after_step: int) -> None:  # noqa: ARG002
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        known = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = kept_id(
            run, "mlflow", lambda: self._client.create_run(known, run_name=run.name).info.run_id
        )
        params = [Param(key, str(value)[:500]) for key, value in flat_settings(settings).items()]
        self._client.log_batch(self._id, params=params[:100])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)
