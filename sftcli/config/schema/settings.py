"""All settings of a run, and how pydantic-settings merges the layers that name them."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from sftcli.config.fields import leaf_fields
from sftcli.config.layers import Layer
from sftcli.config.schema.adapter import AdapterSettings
from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.run import CheckpointSettings, ModelSettings, RunSettings, SamplingSettings
from sftcli.config.schema.training import TrainingSettings

current_layers: ContextVar[Sequence[Layer]] = ContextVar("layers", default=())


class _LayerSource(PydanticBaseSettingsSource):
    """One layer as pydantic-settings wants to see a source."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:  # noqa: ARG002
        """Return nothing: the whole layer is handed over at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, object]:
        """Return the layer as nested tables."""
        tables: dict[str, dict[str, object]] = {}
        for key, entry in self._layer.entries.items():
            section, _, name = key.partition(".")
            tables.setdefault(section, {})[name] = entry.value
        return dict(tables)


class Settings(BaseSettings):
    """All settings of a run. Made by ``resolve``; made directly, it reads neither environment nor files."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    adapter: AdapterSettings = AdapterSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    sampling: SamplingSettings = SamplingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the layers of the current ``resolve``, the strongest first, in place of the process's environment."""
        return (
            init_settings,
            *(_LayerSource(settings_cls, layer) for layer in reversed(current_layers.get())),
        )


FIELDS: Mapping[str, FieldInfo] = leaf_fields(Settings)
