"""Tinker's API on the wire: what its client does when it tries again, sends out of order, or is somebody else."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from gated import client_of, make_key
from scripted import CONTEXT, scripted
from scripted_training import ScriptedWorker
from smelt.api import tinker_training
from smelt.api.app import create_app
from smelt.api.draining import Draining
from smelt.api.services import Services
from smelt.control import abuse_checker, samplers
from smelt.storage import records
from smelt.storage.records import Ban, Key
from smelt.transport import tinker_pb2 as pb

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

PROTOBUF = {"content-type": "application/x-protobuf"}
ADAM = {"learning_rate": 1e-3}
SAMPLE = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 2}}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with scripted(tmp_path / "home") as (services, _):
        yield services


class Client:
    """Somebody who speaks to the API."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return await self.http.post(f"/api/v1/{path}", json={} if body is None else body, headers=headers)

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(f"/api/v1/{path}")

    async def session(self) -> str:
        return str((await self.post("create_session", {"tags": []})).json()["session_id"])

    async def model(self, session: str | None = None, number: int = 0) -> str:
        session = session or await self.session()
        body = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 4}}
        return str((await self.post("create_model", body)).json()["model_id"])

    async def forward_backward(
        self, model_id: str, seq: int, loss: str = "cross_entropy", num: int = 2
    ) -> httpx.Response:
        return await self.send(forward_backward(model_id, seq, loss, num))

    async def send(self, body: bytes, **headers: str) -> httpx.Response:
        return await self.http.post("/api/v1/forward_backward", content=body, headers=PROTOBUF | headers)

    async def optim_step(self, model_id: str, seq: int, **adam: Any) -> httpx.Response:
        return await self.post("optim_step", {"model_id": model_id, "seq_id": seq, "adam_params": ADAM | adam})

    async def result(self, promised: httpx.Response) -> httpx.Response:
        assert promised.status_code == 200, promised.text
        return await self.post("retrieve_future", {"request_id": promised.json()["request_id"]})


def forward_backward(model_id: str, seq: int, loss: str = "cross_entropy", num: int = 2) -> bytes:
    tokens = np.arange(num, dtype="<i4").tobytes()
    targets = pb.Tensor(dense=np.arange(num, dtype="<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[num])
    datum = pb.Datum(
        model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens))],
        loss_fn_inputs={"target_tokens": targets},
    )
    return pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq, data=[datum], loss_fn=loss).SerializeToString()


@asynccontextmanager
async def working(services: Services) -> AsyncIterator[ScriptedWorker]:
    """A worker, while the block runs."""
    worker = ScriptedWorker(services.ledger, services.settings.home)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def client(services: Services) -> AsyncIterator[Client]:
    async with client_of(create_app(services)) as http:
        yield Client(http)


def error_of(answer: httpx.Response) -> str:
    """Why a promise has failed, through the user's fault."""
    assert answer.status_code == 200
    assert answer.json()["category"] == "user"
    return str(answer.json()["error"])


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


def sampling(model_id: str, number: int = 3) -> dict[str, Any]:
    return {"session_id": model_id.partition(":")[0], "sampling_session_seq_id": number, "base_model": "tiny"}


async def test_samples_are_told_apart_by_their_seq_however_large(client: Client, services: Services) -> None:
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    seqs = (0, 1, 10**18 - 1)
    promises = []
    for seq in seqs:
        body = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 3, **SAMPLE}
        first, again = [await client.post("asample", body) for _ in range(2)]
        assert first.json() == again.json()
        assert len(set(first.json()["sample_sequence_ids"])) == 3
        promises.append(first)
    assert len({each.json()["request_id"] for each in promises}) == 3
    async with working(services) as worker:
        for promised in promises:
            answer = await client.result(promised)
            assert answer.headers["content-type"] == "application/x-protobuf"
            assert len(pb.SampleResponse.FromString(answer.content).sequences) == 3
        assert len(worker.samples) == 3


async def test_a_crowd_of_samples_is_asked_to_wait_and_leaves_no_trace(
    client: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "MAX_WAITING", 1)
    monkeypatch.setattr(samplers, "COUNT_S", 0.0)
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    body = {"sampling_session_id": sampler, "num_samples": 1, **SAMPLE}
    assert (await client.post("asample", {**body, "seq_id": 0})).status_code == 200
    full = await client.post("asample", {**body, "seq_id": 1})
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    async with working(services):
        await client.result(await client.post("optim_step", {"model_id": model_id, "seq_id": 1}))
        monkeypatch.setattr(samplers, "MAX_WAITING", 9)
        assert (await client.result(await client.post("asample", {**body, "seq_id": 1}))).status_code == 200


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"prompt": {"chunks": []}}, "no tokens"),
        ({"prompt": {"chunks": [{"type": "image", "data": "x", "format": "png"}]}}, "only text"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "tokens that the model does not"),
        ({"sampling_params": {"max_tokens": CONTEXT}}, "exceeds the model's context window: 2 + 48 > 48"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
        ({"target_prompt_logprobs": {"data": [1], "shape": [5, 1]}}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [1], "shape": [1, 10**9]}}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [9999], "shape": [1, 1]}}, "tokens that the model does not"),
        ({"topk_sample_logprobs": 999}, "no more than 257 tokens"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 2}, "below the prompt's 2 tokens"),
    ],
)
async def test_a_sample_that_cannot_be_drawn_is_refused_at_once(
    client: Client, change: dict[str, Any], told: str
) -> None:
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    answer = await client.post("asample", {"sampling_session_id": sampler, "seq_id": 0, **SAMPLE, **change})
    assert answer.status_code == 400
    assert told in answer.json()["detail"]


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


async def test_what_was_promised_elsewhere_is_not_told_here(client: Client, services: Services) -> None:
    body = {"model": "tiny", "prompt": "a", "background": True}
    other = (await client.http.post("/v1/completions", json=body)).json()["id"].removeprefix("cmpl-")
    assert (await client.post("retrieve_future", {"request_id": other})).status_code == 404
    step = await client.optim_step(await client.model(), 1)
    await services.ledger.cancel("local", step.json()["request_id"])
    assert "cancelled" in error_of(await client.result(step))
    nothing = {"session_id": await client.session(), "sampling_session_seq_id": 0}
    assert (await client.post("create_sampling_session", nothing)).status_code == 400
