"""What the routes stand on, put together once by the process (or by a test); knows no route."""

from dataclasses import dataclass

from sqlalchemy import Engine

from smelt.control.model_server import ModelServer
from smelt.settings import Settings
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may ask. `default_model` is the name or folder given to `smelt serve`, if any."""

    settings: Settings
    database: Engine  # for reading; whoever writes goes through the writer
    writer: Writer
    ledger: Ledger
    model_server: ModelServer
    default_model: str | None = None
