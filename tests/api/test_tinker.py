"""Tinker's API on the wire: what its client does when it tries again, sends out of order, or sends what is wrong."""

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gated import client_of
from scripted import CONTEXT, scripted
from smelt.api import tinker_training
from smelt.api.app import create_app
from smelt.api.draining import Draining
from smelt.api.services import Services
from smelt.transport import tinker_pb2 as pb
from tinker_speaker import (
    Client,
    client,
    error_of,
    forward_backward,
    sampling,
    services,
    working,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

__all__ = ["client", "services"]


async def test_the_same_request_again_is_the_same_promise_and_done_once(client: Client, services: Services) -> None:
    model_id = await client.model()
    answers = await asyncio.gather(*[client.optim_step(model_id, 1) for _ in range(32)])
    assert len({answer.json()["request_id"] for answer in answers}) == 1
    async with working(services) as worker:
        await client.result(answers[0])
        assert worker.done == [(model_id, 0, "create_model"), (model_id, 1, "optim_step")]
        again = await client.optim_step(model_id, 1)
        assert again.json() == answers[0].json()
        assert (await client.result(again)).json()["metrics"]
        assert len(worker.done) == 2


async def test_a_seq_that_was_another_request_is_refused_for_good(client: Client) -> None:
    model_id = await client.model()
    first = await client.optim_step(model_id, 1)
    other = await client.optim_step(model_id, 1, beta1=0.5)
    assert other.status_code == 422
    assert other.headers["x-should-retry"] == "false"
    assert "send this optim_step under the next seq" in other.json()["detail"]
    assert (await client.forward_backward(model_id, 1)).status_code == 422
    assert (await client.optim_step(model_id, 1)).json() == first.json()


async def test_models_and_samplers_are_the_same_when_asked_for_again(client: Client, services: Services) -> None:
    session = await client.session()
    model_id = await client.model(session)
    assert model_id == f"{session}:train:0"
    assert await client.model(session) == model_id
    body = {"session_id": session, "sampling_session_seq_id": 5, "base_model": "tiny"}
    opened = [await client.post("create_sampling_session", body) for _ in range(2)]
    assert [each.json()["sampling_session_id"] for each in opened] == [f"{session}:sample:5"] * 2
    async with working(services):
        save = {"model_id": model_id, "seq_id": 1, "path": "w"}
        path = (await client.result(await client.post("save_weights_for_sampler", save))).json()["path"]
    other = await client.post("create_sampling_session", {**body, "base_model": None, "model_path": path})
    assert other.status_code == 422


async def test_a_sampler_without_a_name_stays_the_first_when_tried_again(client: Client, services: Services) -> None:
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "kind": "snapshot"}
    first = await client.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 0})
    again = await client.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 1})
    assert first.json() == again.json()
    taken = await client.post("save_weights_for_sampler", {**body, "seq_id": 2, "sampling_session_seq_id": 0})
    async with working(services):
        made = (await client.result(again)).json()
        assert made["sampling_session_id"] == f"{model_id.partition(':')[0]}:sample:0"
        assert "another sampler" in error_of(await client.result(taken))


async def test_what_comes_out_of_order_is_done_in_order(client: Client, services: Services) -> None:
    model_id = await client.model()
    promises = {seq: await client.forward_backward(model_id, seq) for seq in (3, 2)}
    promises[4] = await client.optim_step(model_id, 4)
    promises[1] = await client.forward_backward(model_id, 1)
    async with working(services) as worker:
        for promised in promises.values():
            assert "error" not in (await client.result(promised)).text
        assert [seq for _, seq, _ in worker.done] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1}}, "adam_params.learning_rate"),
        ("optim_step", {"adam_params": {"learning_rate": "much"}}, "adam_params.learning_rate"),
        ("optim_step", {"adam_params": [1]}, "adam_params"),
        ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "dimuon"),
        ("save_weights", {"path": "../../etc"}, "cannot be called"),
        ("save_weights", {"path": 5}, "path"),
        ("save_weights", {"path": "w", "ttl_seconds": 1}, "ttl_seconds"),
        ("load_weights", {"path": "nowhere"}, "no path of weights"),
        ("load_weights", {"optimizer": "yes"}, "path is missing"),
        ("load_weights", {"path": "tinker://a/weights/b"}, "no weights"),
        ("save_weights_external", {"path": "w", "age_encryption_recipients": ["age1"]}, "encrypted"),
    ],
)
async def test_a_body_that_is_wrong_takes_its_place_and_fails_there(
    client: Client, services: Services, path: str, body: dict[str, Any], told: str
) -> None:
    model_id = await client.model()
    wrong = await client.post(path, {"model_id": model_id, "seq_id": 1, **body})
    after = await client.optim_step(model_id, 2)
    async with working(services) as worker:
        assert told in error_of(await client.result(wrong))
        assert (await client.result(after)).json()["metrics"]
        assert [seq for _, seq, _ in worker.done] == [0, 2]
    assert (await client.post(path, {"model_id": model_id, "seq_id": 1, **body})).json() == wrong.json()


async def test_infinity_is_no_number_of_an_optimizer(client: Client) -> None:
    model_id = await client.model()
    for text in ("1e999", "NaN", "Infinity"):
        raw = f'{{"model_id": "{model_id}", "seq_id": 1, "adam_params": {{"learning_rate": {text}}}}}'
        answer = await client.http.post("/api/v1/optim_step", content=raw, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 422)
        if answer.status_code == 200:
            assert error_of(await client.result(answer))


async def test_what_has_no_place_is_refused_at_once_with_a_body(client: Client) -> None:
    for answer in (
        await client.post("optim_step", {"seq_id": 1}),
        await client.post("optim_step", {"model_id": 5, "seq_id": 1}),
        await client.post("optim_step", {"model_id": "m", "seq_id": -1}),
        await client.send(b"\xff\xff\xff"),
        await client.http.post("/api/v1/forward_backward", content=b"{}", headers={"content-type": "text/plain"}),
        await client.optim_step("nobody:train:0", 1),
        await client.forward_backward("nobody:train:0", 1),
        await client.post("retrieve_future", {"request_id": "0" * 32}),
        await client.post("session_heartbeat", {"session_id": "x"}),
        await client.get("samplers/x"),
        await client.get("training_runs/x"),
        await client.post("create_model", {"session_id": "x", "model_seq_id": 0, "base_model": "tiny"}),
        await client.post("load_weights", {"session_id": "x", "path": "tinker://a/weights/b"}),
        await client.post("create_session", {"tags": [], "user_metadata": {str(n): n for n in range(300)}}),
    ):
        assert answer.status_code in (400, 404, 415, 422), answer.text
        assert answer.json()["detail"]


async def test_a_hole_is_given_up_and_the_lane_goes_on(services: Services) -> None:
    services.ledger._hole_timeout_s = 0.0
    async with client_of(create_app(services)) as http, working(services) as worker:
        client = Client(http)
        model_id = await client.model()
        step = await client.optim_step(model_id, 2)
        waiting = asyncio.ensure_future(client.result(step))
        await services.ledger.abandon_holes()
        await services.ledger.abandon_holes()
        assert (await waiting).json()["metrics"]
        assert [seq for _, seq, _ in worker.done] == [0, 2]
        late = await client.forward_backward(model_id, 1)
        assert (late.status_code, late.headers["x-should-retry"]) == (422, "false")


async def test_a_promise_that_is_open_is_asked_for_again_in_silence(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinker_training, "POLL_S", 0.02)
    model_id = await client.model()
    answer = await client.result(await client.optim_step(model_id, 1))
    assert answer.status_code == 408
    assert answer.json()["type"] == "try_again"
    assert answer.json()["queue_state"] == "paused_capacity", "there is no worker"


async def test_a_server_that_goes_down_lets_nobody_wait(services: Services) -> None:
    app = Draining(create_app(services))
    async with client_of(app) as http:
        client = Client(http)
        promised = await client.optim_step(await client.model(), 1)
        polling = asyncio.ensure_future(client.result(promised))
        while not services.ledger._waiting:  # noqa: ASYNC110 - nobody announces a poll
            await asyncio.sleep(0.002)
        app.begin()
        assert (await asyncio.wait_for(polling, 5)).status_code == 408


async def test_promises_and_results_outlive_the_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with scripted(home) as (services, _):
        async with client_of(create_app(services)) as http:
            client = Client(http)
            model_id = await client.model()
            done = await client.forward_backward(model_id, 1)
            async with working(services):
                result = await client.result(done)
            queued = await client.optim_step(model_id, 2)
            sample = await client.post("create_sampling_session", sampling(model_id))
    with scripted(home) as (services, _):
        async with client_of(create_app(services)) as http:
            client = Client(http)
            assert (await client.result(done)).content == result.content
            assert (await client.forward_backward(model_id, 1)).json() == done.json()
            assert (await client.optim_step(model_id, 2)).json() == queued.json()
            assert (await client.post("create_sampling_session", sampling(model_id))).json() == sample.json()
            async with working(services) as worker:
                assert (await client.result(queued)).json()["metrics"]
                assert worker.done == [(model_id, 2, "optim_step")]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("encoding", PACKERS)
async def test_packed_bodies_mean_the_same(client: Client, encoding: str) -> None:
    model_id = await client.model()
    body = forward_backward(model_id, 1)
    plain = await client.send(body)
    assert (await client.send(PACKERS[encoding](body), **{"content-encoding": encoding})).json() == plain.json()


async def test_a_large_body_is_understood_and_found_again(client: Client, services: Services) -> None:
    model_id = await client.model()
    datum = pb.ForwardBackwardRequest.FromString(forward_backward(model_id, 1, num=CONTEXT)).data[0]
    body = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, data=[datum] * 4000, loss_fn="cross_entropy")
    async with working(services):
        answer = await client.result(await client.send(body.SerializeToString()))
    assert pb.ForwardBackwardOutput.FromString(answer.content).loss_fn_outputs[0].num_datums == 4000


async def test_a_finished_session_is_told_at_the_next_heartbeat(client: Client) -> None:
    session = await client.session()
    assert (await client.post("session_heartbeat", {"session_id": session})).status_code == 200
    for kind in ("errored", "success"):
        answer = await client.post(f"sessions/{session}/finish", {"reason": {"type": kind}, "detail": "x"})
        assert answer.status_code == 204
    assert (await client.post("session_heartbeat", {"session_id": session})).status_code == 410
    [found] = (await client.post("sessions/search", {"session_id": session})).json()["sessions"]
    assert found["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "x"}


async def test_expired_results_still_answer(client: Client, services: Services) -> None:
    async with working(services):
        step = await client.optim_step(await client.model(), 1)
        assert (await client.result(step)).json()["metrics"]
    await services.ledger.expire(0.0)
    assert error_of(await client.result(step)) == "result expired"


async def test_clients_are_told_how_to_behave(client: Client) -> None:
    config = (await client.post("client/config", {"sdk_version": "0.38.0"})).json()
    assert (config["pjwt_auth_enabled"], config["parallel_fwdbwd_chunks"], config["proto_compress_fwdbwd"]) == (
        False,
        False,
        False,
    )
    assert (await client.post("client/dynamic_config", {})).json()["refresh_interval_sec"] == 300
    telemetry = {"events": [{"event": "GENERIC_EVENT", "severity": "INFO"}, {"event": "x" * 999}, 5]}
    assert (await client.post("telemetry", telemetry)).json() == {"status": "accepted"}
    figures = (await client.http.get("/metrics")).text
    assert 'smelt_client_events_total{event="GENERIC_EVENT",severity="INFO"} ' in figures
    assert "xxx" not in figures


async def test_each_answer_is_strict_json_without_statuses_that_hang_a_client(client: Client) -> None:
    model_id = await client.model()
    for path, body in (
        ("create_model", {"session_id": model_id.partition(":")[0], "model_seq_id": 0, "base_model": "tiny"}),
        ("save_weights", {"model_id": model_id, "seq_id": 1, "path": "w"}),
        ("save_weights", {"model_id": model_id, "seq_id": 2, "path": "w"}),
        ("save_weights", {"model_id": model_id, "seq_id": 2, "path": "x"}),
    ):
        answer = await client.post(path, body)
        assert answer.status_code in (200, 422)
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))


async def test_a_promise_that_kills_its_workers_has_failed_by_our_fault(client: Client, services: Services) -> None:
    promised = await client.optim_step(await client.model(), 1)
    for _ in range(6):
        epoch = await services.ledger.open_epoch()
        kinds = ("create_model", "optim_step")
        try:
            await asyncio.wait_for(services.ledger.next_grants(epoch, 9, kinds), 0.2)
        except TimeoutError:
            break
        await services.ledger.release(epoch)
    answer = (await client.result(promised)).json()
    assert (answer["category"], "workers died" in answer["error"]) == ("server", True)
    [run] = (await client.get("training_runs")).json()["training_runs"]
    assert run["corrupted"] is True
