"""/api/model: what may be loaded and what is refused, what is told of it, and that the others mean it too."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gated import client_of
from holding import CONFIG, Holding, holding_server, write_source
from smelt.api.app import create_routes
from smelt.api.gate import Gate
from smelt.api.services import Services
from smelt.api.sessions import Sessions
from smelt.control import imports
from smelt.control.keyring import KeyRing
from smelt.control.models import set_alias, show_model
from smelt.errors import MissingDependency

pytestmark = pytest.mark.anyio

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 257, "bias": True, "dropout": 0.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Services, Holding]]:
    with holding_server(tmp_path / "home") as server:
        yield server


@pytest.fixture
async def client(server: tuple[Services, Holding]) -> AsyncIterator[httpx.AsyncClient]:
    """With the imports at work."""
    services, _ = server
    ring, sessions = KeyRing(services.database), Sessions(services.settings.home)
    app = create_routes(services, ring, sessions)
    gate = Gate(app, services.settings, ring, sessions)
    async with app.router.lifespan_context(app), client_of(gate) as client:
        yield client


async def load(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await client.post("/api/model/load", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    return answer.json()["model_info"]


async def refused(client: httpx.AsyncClient, status: int, **body: Any) -> str:
    answer = await client.post("/api/model/load", json=body)
    assert (answer.status_code, answer.json()["success"]) == (status, False)
    return str(answer.json()["error"])


async def test_a_loaded_model_is_the_default_one(server: tuple[Services, Holding], client: httpx.AsyncClient) -> None:
    services, holding = server
    set_alias("short", "two", services.settings.models)
    assert (await client.get("/api/model/info")).json() == {"loaded": False}
    info = await load(client, model_type="short")
    assert holding.held == ["two"]
    assert info == {
        "model_type": "two",
        "checkpoint_path": None,
        "config": {"model": SHAPE},
        "num_parameters": CONFIG.num_parameters,
        "num_parameters_millions": round(CONFIG.num_parameters / 1e6, 2),
        "architecture": SHAPE,
        "device": "cpu",
        "dtype": "auto",
    }
    assert (await client.get("/api/model/info")).json() == {"loaded": True, **info}
    for alias in ("gpt", "default"):
        assert (await client.get(f"/v1/models/{alias}")).json()["alias_of"] == "two"


async def test_its_config_can_be_downloaded(client: httpx.AsyncClient) -> None:
    nothing = await client.get("/api/model/config")
    assert (nothing.status_code, nothing.json()["success"]) == (404, False)
    await load(client, model_type="one")
    shown = await client.get("/api/model/config")
    assert shown.json() == {"model": SHAPE}
    assert "content-disposition" not in shown.headers
    saved = await client.get("/api/model/config?download=true")
    assert saved.headers["content-disposition"] == "attachment; filename=model_config.json"


async def test_a_model_of_the_home_folder_is_imported_first(
    server: tuple[Services, Holding], client: httpx.AsyncClient
) -> None:
    services, holding = server
    run = services.settings.runs / "out-docs"
    write_source(run / "best")
    info = await load(client, checkpoint_path="runs/out-docs/best")
    assert (info["model_type"], info["checkpoint_path"]) == ("out-docs", "runs/out-docs/best")
    assert holding.held == ["out-docs"]
    assert show_model("out-docs", services.settings.models).origin == "runs/out-docs/best"
    assert "a model 'out-docs' exists" in await refused(client, 409, checkpoint_path=str(run / "best"))
    assert (await load(client, checkpoint_path=str(services.settings.models / "one")))["model_type"] == "one"


async def test_a_model_of_the_hub_is_fetched_or_says_why_not(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = write_source(tmp_path / "cached")
    monkeypatch.setattr(imports, "hub_folder", lambda *_names, progress: cached)
    assert (await load(client, model_type="gpt2"))["model_type"] == "gpt2"
    assert (await load(client, model_type="hf:distilgpt2"))["model_type"] == "distilgpt2"
    assert (await load(client, model_type="hf:org/name"))["model_type"] == "name"

    def offline(*_names: str, progress: object) -> None:
        raise MissingDependency("no network")

    monkeypatch.setattr(imports, "hub_folder", offline)
    await refused(client, 501, model_type="gpt2-xl")
    assert (await client.get("/v1/models/gpt")).json()["alias_of"] == "name"  # as it was


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"model_type": "onn"}),
        (404, {"checkpoint_path": "runs/nothing", "model_type": "one"}),  # never the other one in its place
        (400, {"checkpoint_path": "/etc/passwd"}),
        (400, {"checkpoint_path": "../../elsewhere/model"}),
        (400, {"checkpoint_path": "https://example.org/ckpt.pt"}),
        (400, {"model_type": "hf:../../x"}),
        (400, {}),
        (400, {"model_type": "one", "config": {"model": {"dropout": 0.1}}}),
        (400, {"model_type": "one", "config_path": "config.yaml"}),
        (400, {"model_type": "one", "device": "cuda"}),
        (400, {"model_type": 7}),
    ],
)
async def test_what_cannot_be_loaded_is_refused(
    server: tuple[Services, Holding], client: httpx.AsyncClient, status: int, body: dict[str, Any]
) -> None:
    await refused(client, status, **body)
    assert server[1].held == []
    assert (await client.get("/v1/aliases")).json() == {"data": []}


async def test_files_are_refused_with_the_remedy(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/model/load", files={"checkpoint": ("ckpt.pt", b"\x80")})
    assert (answer.status_code, answer.json()["success"]) == (415, False)
    assert "smelt models import out/ckpt.pt NAME" in answer.json()["error"]


async def test_without_a_worker_nothing_changes(server: tuple[Services, Holding], client: httpx.AsyncClient) -> None:
    server[1].is_there = False
    await refused(client, 503, model_type="one")
    assert (await client.get("/v1/aliases")).json() == {"data": []}


async def test_a_wrong_method_is_refused_in_that_shape_too(client: httpx.AsyncClient) -> None:
    wrong = await client.put("/api/model/load")
    assert (wrong.status_code, wrong.json()) == (405, {"success": False, "error": "Method Not Allowed"})
