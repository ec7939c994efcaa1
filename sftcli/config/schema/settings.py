"""All settings of a run, and how pydantic-settings merges the layers that name them."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Self

from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from sftcli.config.fields import leaf_fields
from sftcli.config.layers import Layer
from sftcli.config.schema.adapter import AdapterSettings
from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.run import CheckpointSettings, ModelSettings, RunSettings, SamplingSettings
from sftcli.config.schema.training import TrainingSettings

_layers: ContextVar[Sequence[Layer]] = ContextVar("layers", default=())


class Settings(BaseSettings):
    """All settings of a run. Made by ``of_layers``; made directly, it reads neither environment nor files."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    adapter: AdapterSettings = AdapterSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    sampling: SamplingSettings = SamplingSettings()

    @property
    def rows_seed(self) -> int:
        """Seed of what is done to the rows before training: the split, and samples of the sources."""
        return self.training.seed if self.data.split_seed is None else self.data.split_seed

    @classmethod
    def of_layers(cls, layers: Sequence[Layer]) -> Self:
        """Return the settings that ``layers`` make together; later layers win.

        Raises:
            ValidationError: A value is wrong, or values do not go together.
        """
        token = _layers.set(layers)
        try:
            return cls()
        finally:
            _layers.reset(token)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the layers of ``of_layers``, the strongest first, in place of the process's environment."""
        layers = [InitSettingsSource(settings_cls, layer.tables()) for layer in reversed(_layers.get())]
        return (init_settings, *layers)


FIELDS: Mapping[str, FieldInfo] = leaf_fields(Settings)
