"""Models over HTTP: what is listed, loaded, removed, named and imported, by whom, and with which errors."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from gated import client_of, make_key
from holding import CONFIG, Holding, holding_server
from smelt.api.app import create_app, create_routes
from smelt.api.gate import Gate
from smelt.api.services import Services
from smelt.api.sessions import Sessions
from smelt.control import keyring
from smelt.control.keyring import KeyRing
from smelt.control.models import import_model, set_alias
from smelt.models.aliases import read_aliases

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Services, Holding]]:
    with holding_server(tmp_path / "home") as server:
        yield server


@pytest.fixture
def services(server: tuple[Services, Holding]) -> Services:
    return server[0]


@pytest.fixture
def holding(server: tuple[Services, Holding]) -> Holding:
    return server[1]


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(services)) as client:
        yield client


async def test_models_and_aliases_are_listed_and_shown(
    services: Services, holding: Holding, client: httpx.AsyncClient
) -> None:
    set_alias("short", "one", services.settings.models)
    set_alias("default", "two", services.settings.models)
    holding.held = ["one"]
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert list(cards) == ["one", "two", "default", "gpt", "short"]
    assert {name: card["alias_of"] for name, card in cards.items()} == {
        "one": None, "two": None, "default": "two", "gpt": "two", "short": "one"
    }  # fmt: skip
    one = cards["one"]
    assert (one["object"], one["owned_by"], one["loaded_by"]) == ("model", "smelt", ["here:1"])
    assert (one["architecture"], one["context"], one["num_parameters"]) == ("gpt2", 16, CONFIG.num_parameters)
    assert one["num_bytes"] > 4 * CONFIG.num_parameters
    assert cards["two"]["loaded_by"] == []
    for name, card in cards.items():
        assert (await client.get(f"/v1/models/{name}")).json() == card


async def test_an_unknown_model_is_not_found_in_openais_shape_with_what_is_near(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/load"), ("POST", "/unload")):
        answer = await client.request(method, f"/v1/models/onn{path}")
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "did you mean one?" in error["message"]


async def test_a_model_is_loaded_and_unloaded(holding: Holding, client: httpx.AsyncClient, services: Services) -> None:
    set_alias("short", "one", services.settings.models)
    assert (await client.post("/v1/models/short/load")).json()["loaded_by"] == ["here:1"]
    assert holding.held == ["one"]
    assert (await client.post("/v1/models/one/unload")).json()["loaded_by"] == []
    holding.is_there = False
    for verb in ("load", "unload"):
        answer = await client.post(f"/v1/models/one/{verb}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")


async def test_a_model_is_removed_from_the_disk_and_from_memory(
    services: Services, holding: Holding, client: httpx.AsyncClient
) -> None:
    holding.held = ["one", "two"]
    assert (await client.delete("/v1/models/one")).json() == {"id": "one", "object": "model", "deleted": True}
    assert holding.held == ["two"]
    assert not (services.settings.models / "one").exists()
    assert (await client.get("/v1/models/one")).status_code == 404
    holding.is_there = False
    assert (await client.delete("/v1/models/two")).status_code == 200


async def test_a_model_with_aliases_is_removed_only_with_them(services: Services, client: httpx.AsyncClient) -> None:
    set_alias("short", "one", services.settings.models)
    refused = await client.delete("/v1/models/one")
    assert (refused.status_code, "short" in refused.json()["error"]["message"]) == (400, True)
    assert "another name of one" in (await client.delete("/v1/models/short")).json()["error"]["message"]
    assert (await client.delete("/v1/models/one?force=true")).status_code == 200
    assert read_aliases(services.settings.models) == {}


async def test_an_alias_is_made_moved_and_removed(services: Services, client: httpx.AsyncClient) -> None:
    made = await client.put("/v1/aliases/short", json={"target": "one"})
    assert (made.status_code, made.json()) == (200, {"alias": "short", "target": "one"})
    assert (await client.get("/v1/models/short")).json()["alias_of"] == "one"
    await client.put("/v1/aliases/short", json={"target": "two"})
    assert (await client.get("/v1/models/short")).json()["alias_of"] == "two"  # at once
    assert (await client.get("/v1/aliases")).json() == {"data": [{"alias": "short", "target": "two"}]}
    assert (await client.delete("/v1/aliases/short")).status_code == 204
    assert (await client.get("/v1/models/short")).status_code == 404
    for path, target, code in (("one", "two", 409), ("gpt", "one", 400), ("new", "nothing", 404), ("..x", "one", 400)):
        answer = await client.put(f"/v1/aliases/{path}", json={"target": target})
        assert (answer.status_code, list(answer.json())) == (code, ["detail"])
    assert (await client.delete("/v1/aliases/short")).status_code == 404
    assert (await client.put("/v1/aliases/short", json={})).status_code == 422


async def test_an_import_is_accepted_followed_and_done(services: Services) -> None:
    ring, sessions = KeyRing(services.database), Sessions(services.settings.home)
    app = create_routes(services, ring, sessions)
    gate = Gate(app, services.settings, ring, sessions)
    async with app.router.lifespan_context(app), client_of(gate) as client:
        answer = await client.post("/v1/imports", json={"source": "models/one", "name": "three"})
        assert answer.status_code == 202
        job = answer.json()
        done = (await client.get(f"/v1/imports/{job['id']}?wait=10")).json()
        assert done["status"] == "completed"
        assert (await client.get("/v1/models/three")).json()["context"] == 16
        assert [each["id"] for each in (await client.get("/v1/imports")).json()["data"]] == [job["id"]]
        assert (await client.delete(f"/v1/imports/{job['id']}")).json()["status"] == "completed"


async def test_an_import_from_elsewhere_is_refused(client: httpx.AsyncClient) -> None:
    for source in ("/etc", "../x", "https://example.org/model"):
        answer = await client.post("/v1/imports", json={"source": source, "name": "three"})
        assert (answer.status_code, "hf:ORG/NAME" in answer.json()["detail"]) == (400, True)
    taken = await client.post("/v1/imports", json={"source": "models/one", "name": "two"})
    assert (taken.status_code, (await client.get("/v1/imports/nothing")).status_code) == (409, 404)


async def test_only_an_administrator_changes_something(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "MAX_AGE_S", 0.0)
    changes = (
        ("DELETE", "/v1/models/one", None),
        ("POST", "/v1/models/one/load", None),
        ("POST", "/v1/models/one/unload", None),
        ("PUT", "/v1/aliases/short", {"target": "one"}),
        ("DELETE", "/v1/aliases/short", None),
        ("POST", "/v1/imports", {"source": "models/one", "name": "three"}),
        ("POST", "/api/model/load", {"model_type": "one"}),
    )
    async with client_of(create_app(services), make_key(services, scopes=["inference", "training"])) as client:
        for path in ("/v1/models", "/v1/models/one", "/v1/aliases", "/api/model/info"):
            assert (await client.get(path)).status_code == 200
        for method, path, body in changes:
            assert (await client.request(method, path, json=body)).status_code == 403, path
    async with client_of(create_app(services), make_key(services, "root", scopes=["admin"])) as client:
        for method, path, body in changes[1:5]:
            assert (await client.request(method, path, json=body)).status_code < 300, path


@pytest.mark.parametrize("quoted", ["Qwen/Qwen3-8B-Base", "Qwen%2FQwen3-8B-Base"])
async def test_a_name_with_a_slash_is_one_name(
    quoted: str, tmp_path: Path, services: Services, holding: Holding, client: httpx.AsyncClient
) -> None:
    name = "Qwen/Qwen3-8B-Base"
    import_model(tmp_path / "source", name, services.settings.models, origin="x")
    assert name in [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert (await client.get(f"/v1/models/{quoted}")).json()["id"] == name
    assert (await client.post(f"/v1/models/{quoted}/load")).json()["id"] == name
    assert holding.held == [name]
    assert (await client.post(f"/v1/models/{quoted}/unload")).json()["loaded_by"] == []
    alias = quoted.replace("Qwen3-8B-Base", "also")
    assert (await client.put(f"/v1/aliases/{alias}", json={"target": name})).json()["alias"] == "Qwen/also"
    assert (await client.delete(f"/v1/aliases/{alias}")).status_code == 204
    assert (await client.delete(f"/v1/models/{quoted}")).json()["deleted"]
    assert (await client.get(f"/v1/models/{quoted}")).status_code == 404


@pytest.mark.parametrize("path", ["..%2F..%2Fetc", "one%2F..%2Ftwo", "%2Fetc%2Fpasswd"])
async def test_a_name_that_would_lead_elsewhere_is_no_model(path: str, client: httpx.AsyncClient) -> None:
    for method, verb in (("GET", ""), ("DELETE", ""), ("POST", "/load")):
        assert (await client.request(method, f"/v1/models/{path}{verb}")).status_code == 404
