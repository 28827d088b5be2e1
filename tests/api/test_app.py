"""The application whole: what it is made of, what it is without torch, its health and its documentation."""

import fcntl
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gated import client_of, services_in
from smelt.api import docs
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.configs import RUN_LOCK
from smelt.control.model_server import WorkerInfo
from smelt.control.run_folders import register
from smelt.run_configs import TrainConfig

pytestmark = pytest.mark.anyio


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with services_in(tmp_path / "home") as services:
        yield services


def test_the_application_starts_where_torch_cannot_be_imported() -> None:
    code = "import sys; sys.modules['torch'] = None; import smelt.api.app"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_health_says_whether_models_are_loaded(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        idle = {"model_loaded": False, "training_active": False}
        assert idle.items() <= (await client.get("/health")).json().items()
        services.model_server.workers.append(WorkerInfo("box:1", 1, "cpu", ("gpt",), 0, 0))
        assert (await client.get("/health")).json()["model_loaded"] is True


async def test_health_says_whether_something_is_trained(services: Services) -> None:
    out_dir = services.settings.runs / "out"
    register(TrainConfig(dataset="text", out_dir=str(out_dir)), services.settings.runs)
    async with client_of(create_app(services)) as client:
        with (out_dir / RUN_LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert (await client.get("/health")).json()["training_active"] is True
        assert (await client.get("/health")).json()["training_active"] is False


async def test_the_documentation_loads_nothing_from_elsewhere(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        page = (await client.get("/docs")).text
        document = (await client.get("/openapi.json")).json()
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page)) <= {
        "/static/icon.svg", "/static/style.css", "/static/header.js", "/dashboard", "/dashboard/playground",
        "/dashboard/models", "/dashboard/sessions", "/dashboard/datasets", "/docs", "/openapi.json",
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page
            assert any(operation.get(name) for name in ("summary", "description")), (method, path)


async def test_the_documents_paths_are_those_that_are_served(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        paths = set((await client.get("/openapi.json")).json()["paths"])
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/runs", "/v1/runs/{run_id}/events"} <= paths
    assert {"/health", "/healthz", "/metrics"} <= paths


def test_an_operation_is_described_with_what_it_takes() -> None:
    document = {
        "components": {
            "schemas": {
                "Body": {
                    "properties": {
                        "name": {"type": "string", "description": "what it is called"},
                        "sizes": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
                    },
                    "required": ["name"],
                }
            }
        },
        "paths": {
            "/things/{id}": {
                "put": {
                    "operationId": "put_thing",
                    "summary": "Put",
                    "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
                    "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}},
                    "responses": {"200": {"description": "done"}},
                }
            }
        },
    }
    ((thing,),) = docs.grouped(document, "http://here").values()
    assert [(field["name"], field["place"], field["type"], field["required"]) for field in thing["parameters"]] == [
        ("id", "path", "string", True),
        ("name", "body", "string", True),
        ("sizes", "body", "list of integer or null", False),
    ]
    assert thing["example"].startswith("curl -X PUT http://here/things/{id} ")
    assert """-d '{"name": "..."}'""" in thing["example"]
