"""Coroutines as tests, on asyncio; the log as the server writes it, into a buffer; a server of scripted answers."""

import io
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from gated import client_of
from scripted import Scripted, scripted
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.api.telemetry import configure_logging, request_log


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class LogFile(io.StringIO):
    """A file that has what was logged by the time it is read."""

    def getvalue(self) -> str:
        request_log.flush()
        return super().getvalue()


@pytest.fixture(autouse=True)
def log_file() -> Iterator[io.StringIO]:
    """What the server logs, as lines of JSON."""
    file, handlers, level = LogFile(), logging.root.handlers[:], logging.root.level
    configure_logging(file)
    yield file
    structlog.reset_defaults()
    request_log.open(None)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Services, Scripted]]:
    with scripted(tmp_path / "home") as served:
        yield served


@pytest.fixture
def services(served: tuple[Services, Scripted]) -> Services:
    return served[0]


@pytest.fixture
def model_server(served: tuple[Services, Scripted]) -> Scripted:
    return served[1]


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(services)) as client:
        yield client
