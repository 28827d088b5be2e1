"""Weights on the wire: where they fit, when they may be loaded, what becomes of copies and of unloaded models."""

import pytest

from smelt.api.services import Services
from tinker_speaker import Client, client, error_of, services, working

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

__all__ = ["client", "services"]


async def test_weights_fit_only_what_they_were_made_for(client: Client, services: Services) -> None:
    model_id = await client.model()
    session = model_id.partition(":")[0]
    whole = {"session_id": session, "model_seq_id": 1, "base_model": "tiny"}
    full = (await client.post("create_model", whole)).json()["model_id"]
    assert (await client.post("get_info", {"model_id": full})).json()["is_lora"] is False
    async with working(services):
        saved = await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1}))
        path = saved.json()["path"]
        assert path.endswith("/weights/000001")
        other = {"model_id": full, "seq_id": 1, "path": path, "optimizer": True}
        assert "has rank 4" in error_of(await client.result(await client.post("load_weights", other)))
        frozen = {"model_id": model_id, "seq_id": 2, "path": "s"}
        sampler = (await client.result(await client.post("save_weights_for_sampler", frozen))).json()["path"]
        load = {"model_id": model_id, "seq_id": 3, "path": sampler, "optimizer": True}
        assert "no optimizer" in error_of(await client.result(await client.post("load_weights", load)))
        load |= {"seq_id": 4, "optimizer": False}
        assert (await client.result(await client.post("load_weights", load))).json()["path"] == sampler


async def test_weights_of_the_same_model_may_be_loaded_before_they_are_saved(
    client: Client, services: Services
) -> None:
    model_id = await client.model()
    save = await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "w"})
    path = f"tinker://{model_id}/weights/w"
    load = await client.post("load_weights", {"model_id": model_id, "seq_id": 2, "path": path, "optimizer": True})
    new = {"session_id": model_id.partition(":")[0], "model_seq_id": 1, "path": path, "optimizer": True}
    early = await client.post("load_weights", new)
    assert (early.status_code, "not saved yet" in early.json()["detail"]) == (404, True)
    async with working(services):
        assert (await client.result(load)).json()["path"] == (await client.result(save)).json()["path"] == path


async def test_copies_belong_to_a_session_or_a_project(client: Client, services: Services) -> None:
    model_id = await client.model()
    async with working(services):
        await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "w"}))
    path = f"tinker://{model_id}/weights/w"
    session = await client.session()
    into = {"source_path": path, "session_id": session, "model_seq_id": 4, "ttl_seconds": 7200}
    copied = [(await client.post("copy_weights", into)).json()["tinker_path"] for _ in range(2)]
    assert copied == [f"tinker://{session}:train:4/weights/w"] * 2
    same = {"x-idempotency-key": "k"}
    archive = {"source_path": path, "destination_project_id": "p"}
    archived = [(await client.post("copy_weights", archive, **same)).json()["tinker_path"] for _ in range(2)]
    assert len(set(archived)) == 1
    assert (await client.post("copy_weights", archive)).json()["tinker_path"] != archived[0]
    assert (await client.post("copy_weights", {"source_path": path})).status_code == 400
    trained = await client.optim_step(f"{session}:train:4", 1)
    assert "given up" in error_of(await client.result(trained))


async def test_nothing_follows_an_unloaded_model(client: Client, services: Services) -> None:
    model_id = await client.model()
    await client.optim_step(model_id, 1)
    unloaded = await client.post("unload_model", {"model_id": model_id})
    after = await client.optim_step(model_id, 2, beta1=0.5)
    assert after.status_code == 422, "its place is taken by the end"
    third = await client.optim_step(model_id, 3)
    async with working(services) as worker:
        assert (await client.result(unloaded)).json()["model_id"] == model_id
        assert "given up" in error_of(await client.result(third))
        assert worker.done[-1] == (model_id, 2, "unload_model")
