"""Settings of this installation: flags over `SMELT_*` variables over `smelt.yaml` over defaults.

The only module that reads the environment. Knows no torch and no model; what belongs to one run is in `configs`.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from smelt.configs import Dtype
from smelt.errors import ConfigError

CONFIG_FILE = "smelt.yaml"


class Settings(BaseSettings):
    """Where things live and what hardware to use, unless a command says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="SMELT_", yaml_file=CONFIG_FILE, extra="forbid", frozen=True, validate_default=True
    )

    home: Path = Field(Path("~/.smelt"), description="folder of datasets, models and runs")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = Field("auto", description="auto picks the fastest that is safe on the device")
    threads: int | None = Field(None, ge=1, description="CPU threads (all the machine's cores)")

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags first, then the environment, then the file of the working folder."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @property
    def datasets(self) -> Path:
        """Folder with one folder per dataset."""
        return self.home / "datasets"

    @property
    def models(self) -> Path:
        """Folder with one folder per model."""
        return self.home / "models"

    @property
    def runs(self) -> Path:
        """Folder with one folder per run that was not given a place of its own."""
        return self.home / "runs"


def load_settings(**flags: Any) -> Settings:
    """Settings with the given flags on top; flags that are None were not given."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as report:
        lines = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in report.errors()]
        raise ConfigError(f"settings ({CONFIG_FILE}, SMELT_*, flags): " + "; ".join(lines)) from None
