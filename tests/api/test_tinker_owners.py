"""Whose sessions, models and promises these are, on the wire: nobody else finds them, whatever key they have."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from gated import client_of, make_key
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.control import abuse_checker
from smelt.storage import records
from smelt.storage.records import Ban, Key
from tinker_speaker import (
    SAMPLE,
    Client,
    client,
    error_of,
    sampling,
    services,
    working,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

__all__ = ["client", "services"]


async def test_others_have_no_hand_in_it_until_it_is_published(services: Services) -> None:
    keys = [make_key(services, owner, owner=owner) for owner in ("ann", "bob")]
    app = create_app(services)
    async with client_of(app, **{"x-api-key": keys[0]}) as a, client_of(app, **{"x-api-key": keys[1]}) as b:
        ann, bob = Client(a), Client(b)
        model_id = await ann.model()
        session = model_id.partition(":")[0]
        step = await ann.optim_step(model_id, 1)
        sampler = (await ann.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
        async with working(services):
            save = {"model_id": model_id, "seq_id": 2, "path": "w"}
            path = (await ann.result(await ann.post("save_weights", save))).json()["path"]
        place = path.removeprefix("tinker://").partition("/")[2]
        checkpoint = f"training_runs/{model_id}/checkpoints/{place}"
        own = (await bob.session(), 0)
        load = {"session_id": own[0], "model_seq_id": 0, "path": path, "optimizer": True}
        tries: dict[str, Callable[[], Awaitable[httpx.Response]]] = {
            "train": lambda: bob.forward_backward(model_id, 3),
            "step": lambda: bob.optim_step(model_id, 3),
            "again": lambda: bob.optim_step(model_id, 1),
            "save": lambda: bob.post("save_weights", {**save, "seq_id": 3}),
            "info": lambda: bob.post("get_info", {"model_id": model_id}),
            "unload": lambda: bob.post("unload_model", {"model_id": model_id}),
            "result": lambda: bob.result(step),
            "sample": lambda: bob.post("asample", {"sampling_session_id": sampler, "seq_id": 0, **SAMPLE}),
            "sampler": lambda: bob.get(f"samplers/{sampler}"),
            "session": lambda: bob.get(f"sessions/{session}"),
            "trace": lambda: bob.get(f"sessions/{session}/trace_export"),
            "beat": lambda: bob.post("session_heartbeat", {"session_id": session}),
            "finish": lambda: bob.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}),
            "open": lambda: bob.post("create_sampling_session", sampling(model_id, 9)),
            "run": lambda: bob.get(f"training_runs/{model_id}"),
            "checkpoints": lambda: bob.get(f"training_runs/{model_id}/checkpoints"),
            "publish": lambda: bob.post(f"{checkpoint}/publish"),
            "remove": lambda: bob.http.delete(f"/api/v1/{checkpoint}"),
            "ttl": lambda: bob.http.put(f"/api/v1/{checkpoint}/ttl", json={"ttl_seconds": None}),
            "urls": lambda: bob.get(f"{checkpoint}/external_weights_urls"),
        }
        public: dict[str, Callable[[], Awaitable[httpx.Response]]] = {
            "load": lambda: bob.post("load_weights", load),
            "draw": lambda: bob.post(
                "create_sampling_session", {**sampling(f"{own[0]}:x"), "base_model": None, "model_path": path}
            ),
            "weights": lambda: bob.post("weights_info", {"tinker_path": path}),
            "accessible": lambda: bob.get(f"training_runs/{model_id}?access_scope=accessible"),
        }
        for name, attempt in {**tries, **public}.items():
            assert (await attempt()).status_code == 404, name
        for listing in ("training_runs", "checkpoints", "sessions"):
            assert model_id not in (await bob.get(listing)).text
        assert (await ann.post(f"{checkpoint}/publish")).status_code == 204
        for name, attempt in public.items():
            assert (await attempt()).status_code == 200, name
        for name, attempt in tries.items():
            assert (await attempt()).status_code in (200, 404), name
        assert (await bob.http.delete(f"/api/v1/{checkpoint}")).status_code == 404
        assert (await ann.get(checkpoint.rpartition("/weights")[0])).json()["checkpoints"][0]["public"]


async def test_a_key_of_the_wrong_kind_opens_nothing(services: Services) -> None:
    key = make_key(services, scopes=["inference"])
    async with client_of(create_app(services), **{"x-api-key": key}) as http:
        client = Client(http)
        assert (await client.post("create_session", {"tags": []})).status_code == 200
        for path in ("create_model", "forward_backward", "optim_step", "save_weights", "load_weights"):
            assert (await client.post(path, {})).status_code == 403, path
        shown = (await client.get("auth/apikey/me")).json()
        assert shown["name"] == "laptop"
        assert (await http.delete("/api/v1/auth/apikey/me")).status_code == 204


async def test_a_banned_key_is_told_so_at_once(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abuse_checker, "MAX_AGE_S", 0.0)
    key = make_key(services)
    async with client_of(create_app(services), **{"x-api-key": key}) as http:
        client = Client(http)
        model_id = await client.model()
        [known] = await asyncio.to_thread(all_keys_of, services)
        ban = Ban(owner="local", key_id=known.id, user="", reason="spam")
        await asyncio.wrap_future(services.writer.write(lambda connection: records.add(connection, ban)))
        answer = await client.optim_step(model_id, 1)
        assert (answer.status_code, "spam" in answer.json()["detail"]) == (403, True)


def all_keys_of(services: Services) -> list[Key]:
    with services.database.connect() as connection:
        return records.all_keys(connection)


async def test_what_was_promised_elsewhere_is_not_told_here(client: Client, services: Services) -> None:
    body = {"model": "tiny", "prompt": "a", "background": True}
    other = (await client.http.post("/v1/completions", json=body)).json()["id"].removeprefix("cmpl-")
    assert (await client.post("retrieve_future", {"request_id": other})).status_code == 404
    step = await client.optim_step(await client.model(), 1)
    await services.ledger.cancel("local", step.json()["request_id"])
    assert "cancelled" in error_of(await client.result(step))
    nothing = {"session_id": await client.session(), "sampling_session_seq_id": 0}
    assert (await client.post("create_sampling_session", nothing)).status_code == 400
