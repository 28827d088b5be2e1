"""Coroutines as tests, on asyncio; the log as the server writes it, into a buffer."""

import io
import logging
from collections.abc import Iterator

import pytest
import structlog

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
