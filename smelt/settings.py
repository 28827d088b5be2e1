"""Settings of this installation: flags over `SMELT_*` variables over `smelt.yaml` over defaults.

The only module that reads the environment. Knows no torch and no model; what belongs to one run is in `configs`.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from smelt.configs import Dtype, Quantize, explained, read_config_file
from smelt.errors import ConfigError

CONFIG_FILE = "smelt.yaml"
CONFIG_VARIABLE = "SMELT_CONFIG"  # names another file in its place


class Settings(BaseSettings):
    """Where things live and what hardware to use, unless a command says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="SMELT_", env_ignore_empty=True, extra="forbid", frozen=True, validate_default=True
    )

    home: Path = Field(Path("~/.smelt"), description="folder of datasets, models and runs")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = Field("auto", description="auto picks the fastest that is safe on the device")
    quantize: Quantize = Field("none", description="int8 rounds the weights of models that are served")
    threads: int | None = Field(None, ge=1, description="CPU threads (all the machine's cores)")
    launcher: Literal["local", "ray"] = Field("local", description="what starts a run's ranks: this machine, or Ray")
    model_memory_mb: int | None = Field(None, ge=1, description="MiB for all models of a worker (what is free)")
    kv_cache_mb: int | None = Field(None, ge=1, description="MiB for the cache of each model (a quarter of the free)")
    max_running: int = Field(64, ge=1, description="answers that a model writes at once")
    gradient_checkpointing: bool = Field(False, description="training by request keeps less in memory, and is slower")
    keep_alive_s: float = Field(300.0, ge=0, description="seconds after which a model that nobody asks is unloaded")

    host: str = Field("127.0.0.1", description="address to serve on; any but this machine's own needs an API key")
    port: int = Field(8000, ge=0, le=65535, description="port to serve on; 0 picks a free one")
    database: str | None = Field(None, description="URL of a PostgreSQL database (a SQLite file in the home folder)")
    allowed_hosts: tuple[str, ...] = Field((), description="more names that requests may call this server by")
    cors_origins: tuple[str, ...] = Field((), description="web pages of other origins that may call the API")
    max_body_mb: int = Field(64, ge=1, description="largest request body, unpacked, in MiB")
    max_upload_mb: int = Field(512, ge=1, description="largest body with a file, which goes to the disk, in MiB")
    worker_address: str | None = Field(None, description="HOST:PORT where workers of other machines dial in")
    worker_key: Path | None = Field(None, description="file of the key they must know (HOME/worker.key)")
    tls_certificate: Path | None = Field(None, description="PEM file: what the server shows them, and they trust")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key")
    ban_rules: Path | None = Field(None, description="YAML file of rules for prompts and answers (none)")
    ban_strikes: int = Field(10, ge=1, description="broken rules after which a key, or one of its users, is banned")
    ban_key_strikes: int = Field(100, ge=1, description="broken rules of all its users after which a key is banned")
    fault: str | None = Field(None, description="for tests: POINT:NTH, where the API or a worker shall die, once")

    @field_validator("home", "ban_rules", "worker_key", "tls_certificate", "tls_key")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

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
        port = InitSettingsSource(settings_cls, _hosted_port())
        return init_settings, env_settings, port, InitSettingsSource(settings_cls, _file_values())

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

    @property
    def kernels(self) -> Path:
        """Folder of what was compiled for this machine's processor: the account's, whatever the home folder is."""
        return cache_folder() / "kernels"

    @property
    def kv_cache_bytes(self) -> int | None:
        """Of each model: what is set, a quarter of what all models may take, or None: the engine decides."""
        if self.kv_cache_mb is not None:
            return self.kv_cache_mb * 2**20
        return None if self.model_memory_mb is None else self.model_memory_mb * 2**18

    @property
    def database_url(self) -> str:
        """Where the database is."""
        return self.database or f"sqlite:///{self.home / 'smelt.db'}"

    @property
    def worker_key_file(self) -> Path:
        """The key that workers of other machines must know."""
        return self.worker_key or self.home / "worker.key"

    @property
    def bodies(self) -> Path:
        """Folder of the ledger's large bodies."""
        return self.home / "bodies"

    @property
    def fault_note(self) -> Path:
        """The file that says that somebody died as `fault` wants."""
        return self.home / ".fault"


def load_settings(**flags: Any) -> Settings:
    """Settings with the given flags on top; flags that are None were not given. ConfigError names what is wrong."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as report:
        raise ConfigError(f"settings ({CONFIG_FILE}, SMELT_*, flags): {explained(report, Settings)}") from None


def use_config_file(path: Path) -> None:
    """Read this file in place of `smelt.yaml`, here and in the processes that are started from now on."""
    os.environ[CONFIG_VARIABLE] = str(path.absolute())


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment in which another process comes to the same settings, flags included."""
    values = {name: value for name, value in settings.model_dump(mode="json").items() if value is not None}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    # Worker and runs share the cores: threads that wait must sleep, unless somebody wants it otherwise.
    # But not before a few microseconds: a step of one token wakes them a hundred times (docs/experiments.md).
    shared = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    return {**shared, **os.environ, **{f"SMELT_{name.upper()}": text for name, text in texts.items()}}


def setting_sources() -> dict[str, str]:
    """Where each setting comes from when no flag is given: its variable, the file, or the default."""
    in_environment, in_file = EnvSettingsSource(Settings)(), _file_values()
    file = os.environ.get(CONFIG_VARIABLE) or CONFIG_FILE
    return {
        name: f"SMELT_{name.upper()}" if name in in_environment else file if name in in_file else "default"
        for name in Settings.model_fields
    }


def runtime_folder() -> Path | None:
    """The user's folder for sockets, $XDG_RUNTIME_DIR; None where there is none."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return Path(folder) if folder else None


def cache_folder() -> Path:
    """The account's folder for what can be made again: `smelt` in $XDG_CACHE_HOME or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smelt"


def tiktoken_cache() -> Path | None:
    """The folder that TIKTOKEN_CACHE_DIR names, where tiktoken keeps vocabularies; None when it is not set."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    return Path(folder) if folder else None


def _hosted_port() -> dict[str, Any]:
    """PORT, which hosting services set."""
    port = os.environ.get("PORT")
    return {"port": port} if port else {}


def _file_values() -> dict[str, Any]:
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return read_config_file(named)
    return read_config_file(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else {}


def show_ray_token() -> None:
    """Have Ray's processes ask each other for the cluster's token, and refuse whoever has none."""
    os.environ["RAY_AUTH_MODE"] = "token"


def is_rank() -> bool:
    """Whether torchrun, SLURM or our own launcher has started this process as one rank of a run."""
    return "WORLD_SIZE" in os.environ
