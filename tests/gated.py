"""The whole application for tests: a database of its own, nobody who computes, and a client that is on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from smelt.api.services import Services
from smelt.control import keys
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.model_server import WorkerInfo
from smelt.settings import load_settings
from smelt.storage.database import open_database
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer

ADDRESS = "http://127.0.0.1:8000"


class Nobody:
    """A model server without workers, until a test lists some."""

    def __init__(self) -> None:
        self.workers: list[WorkerInfo] = []


@contextmanager
def services_in(home: Path, **settings: Any) -> Iterator[Services]:
    """What the routes stand on, in an empty home folder."""
    home.mkdir(parents=True, exist_ok=True)
    chosen = load_settings(home=home, **settings)
    engine = open_database(chosen.database_url)
    writer = Writer(engine)
    ledger, checker = Ledger(engine, writer, Files(chosen.bodies)), AbuseChecker(chosen, engine, writer)
    yield Services(chosen, engine, writer, ledger, Nobody(), checker)
    writer.close()
    engine.dispose()


def make_key(services: Services, name: str = "laptop", **options: Any) -> str:
    return services.writer.write(lambda connection: keys.create_key(connection, name, **options)).result(5)


def client_of(app: ASGIApp, key: str | None = None, **headers: str) -> httpx.AsyncClient:
    """A client without a network; what the application raises is its answer's business."""
    bearer = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 1234))
    return httpx.AsyncClient(transport=transport, base_url=ADDRESS, headers=bearer | headers)


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def refused(client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    error = (await ask(client, path, body, status))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
